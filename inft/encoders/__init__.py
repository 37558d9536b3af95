"""Text encoders: masked pretraining, contrastive fine-tuning, embeddings and their evaluation."""
