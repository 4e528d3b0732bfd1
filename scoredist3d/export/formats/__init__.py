"""Writers of file formats, one module per format, and their registry, :mod:`scoredist3d.export.formats.base`."""
