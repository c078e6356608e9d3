"""Rows on disk to batches with a proven loss mask."""
