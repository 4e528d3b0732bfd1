"""Triangle meshes and Gaussian splats as data: files, iso-surfaces, repair, sampling and UV unwrapping."""
