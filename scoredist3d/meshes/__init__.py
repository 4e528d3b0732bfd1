"""Shapes outside of any optimisation: triangle meshes, surfaces of density fields, clean-up, texture coordinates."""
