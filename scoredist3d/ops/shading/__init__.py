"""Colour curves, spherical harmonics, and light from environment maps."""
