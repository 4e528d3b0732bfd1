"""Triangle rasterization: visibility, interpolation, texture sampling and silhouette antialiasing."""
