"""Triangle mesh and Gaussian splat data: file loading, iso-surface extraction, repair, sampling and UV unwrapping."""
