"""What scripts/make_tiny_models is made of: tokenizer, processors, architectures and the base training."""
