"""Multiresolution hash encoding: the operator in ``encoding``, and its torch, C and Triton backends."""
