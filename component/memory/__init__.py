"""Predict the memory of a training step, and train layers within it."""
