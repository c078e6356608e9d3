"""Hugging Face checkpoints to and from Megatron-Core, without Megatron and without a GPU."""
