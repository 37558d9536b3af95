"""inft: fine-tune vision-language models on captioned images in many languages."""

__version__ = "0.1.0"
