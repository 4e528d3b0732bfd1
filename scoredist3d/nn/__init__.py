"""Small networks and encodings used by geometries and materials, and their fitting to target values."""
