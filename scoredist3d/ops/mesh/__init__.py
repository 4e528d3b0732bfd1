"""Operators on triangle meshes: closest points and signed distance, regularisers, connectivity."""
