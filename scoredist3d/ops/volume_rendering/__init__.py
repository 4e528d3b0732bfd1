"""Volume rendering: ray marching with an occupancy grid, and emission-absorption compositing."""
