"""What the examples share: their options, the parallel texts, the model, the curves and the summary."""
