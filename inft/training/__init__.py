"""Fine-tuning: load, quantise, adapt, guard, train, keep the best."""
