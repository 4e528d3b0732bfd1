"""Splatting of 3D Gaussians: projection, tile lists and compositing, with torch, C, Triton and gsplat backends."""
