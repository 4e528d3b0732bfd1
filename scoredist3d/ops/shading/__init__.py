"""Color transfer functions, spherical harmonics, and lighting by environment maps."""
