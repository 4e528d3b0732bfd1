"""Ray marching with an occupancy grid, and emission-absorption compositing of the samples."""
