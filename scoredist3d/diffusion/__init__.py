"""Diffusion maths that no model family owns: noise schedules and what networks predict on them."""
