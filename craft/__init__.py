"""Contrastive terms for any trainer (CRAFT)."""
