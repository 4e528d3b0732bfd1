"""Triangle rasterisation: visibility, interpolation, texture lookup and silhouette antialiasing."""
