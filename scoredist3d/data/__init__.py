"""Data: cameras to train and evaluate from, and procedural objects to learn from."""
