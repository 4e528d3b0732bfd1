"""Data: samplers of training and evaluation cameras."""
