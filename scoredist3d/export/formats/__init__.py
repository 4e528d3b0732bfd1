"""Writers of mesh files, one module per format."""
