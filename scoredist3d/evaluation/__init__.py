"""Measurements of results: image statistics and distances between surfaces."""
