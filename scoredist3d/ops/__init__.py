"""Differentiable operators: hash grids, volume rendering, rasterization, splatting, iso-surfaces, meshes and shading.

Operators map tensors to tensors and do not depend on scenes, configurations or training. Every operator has a
plain-torch backend that runs anywhere; faster backends are selected by ``backend="auto"`` (see
:mod:`scoredist3d.ops.backends`).
"""
