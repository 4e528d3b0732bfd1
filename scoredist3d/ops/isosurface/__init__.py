"""Differentiable iso-surface extraction: marching tetrahedra, FlexiCubes, and their grids."""
