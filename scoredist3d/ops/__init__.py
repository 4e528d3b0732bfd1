"""Differentiable operators: hash grid, occupancy grid, ray marching, compositing.

Tensors in, tensors out; nothing here knows about scenes, configs or training. Every operator has a plain-torch backend
that runs anywhere and faster ones chosen by ``backend="auto"`` (see :mod:`scoredist3d.ops.backends`).
"""
