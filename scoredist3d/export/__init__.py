"""From an object to files: surface, simplification, UV atlas, baked textures; GLB, OBJ, PLY, STL, USDZ, splats; video.

Modules import their heavy packages where they use them, so listing exporters stays cheap.
"""
