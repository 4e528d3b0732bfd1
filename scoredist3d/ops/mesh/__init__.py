"""Operators on triangle meshes: closest points, signed distance, regularizers and connectivity."""
