"""Differential privacy of training steps: per-example clipping, noise, accounting and calibration."""
