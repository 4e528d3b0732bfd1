"""Surfaces from scalar fields: marching tetrahedra, FlexiCubes, and the tetrahedral lattices that they use."""
