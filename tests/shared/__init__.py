"""What several test modules use: tiny configs, scenes, shapes, files and reference maths."""
