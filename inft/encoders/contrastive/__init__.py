"""Contrastive fine-tuning of text encoders: pairs with hard negatives, GradCache, retrieval, STS, export."""
