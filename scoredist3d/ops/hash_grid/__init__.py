"""Multiresolution hash encoding, with torch, C, Triton and tiny-cuda-nn backends."""
