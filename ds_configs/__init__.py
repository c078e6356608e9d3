"""DeepSpeed settings under the names users know."""
