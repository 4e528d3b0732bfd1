"""Export of objects to files: surface extraction, simplification, UV unwrapping, texture baking, file formats, video.

Modules import heavy packages inside the functions that use them, so listing the exporters is fast.
"""
