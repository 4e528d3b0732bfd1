"""Measuring results: the probe network and image statistics."""
