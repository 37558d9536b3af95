"""The training client: fine-tuning driven step by step from Python or over HTTP."""
