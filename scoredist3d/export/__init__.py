"""From a density and colour field to files: surface, simplification, UV atlas, baked texture, GLB / OBJ / PLY, video.

Modules import their heavy packages where they use them, so listing exporters stays cheap.
"""
