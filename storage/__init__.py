"""What is on disk is whole, checked and safe to read."""
