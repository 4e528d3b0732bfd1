"""Small networks and encodings used by geometry and materials, and their regression to target values."""
