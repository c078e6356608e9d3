"""Adapter and base to merged weights, offline."""
