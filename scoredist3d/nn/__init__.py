"""Small networks that geometry and materials use, and their regression to given values."""
