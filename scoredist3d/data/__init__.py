"""Data: samplers of the cameras for training and evaluation."""
