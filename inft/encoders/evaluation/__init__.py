"""What a stored encoder is worth: GLUE, pseudo-perplexity, retrieval, similarity of sentences, MTEB."""
