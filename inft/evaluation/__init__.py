"""What a model says: captions of held-out samples and how close they come to their references."""
