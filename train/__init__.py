"""Arguments to a trained checkpoint."""
