"""Evaluation of results: image statistics and distances between surfaces."""
