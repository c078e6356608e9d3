"""finebridge: fine-tune Hugging Face language models with the HF Trainer on DeepSpeed.

Raw messages in, trained and merged weights out. The rooms of the house are listed in README.md.
"""

__version__ = "0.1.0"
