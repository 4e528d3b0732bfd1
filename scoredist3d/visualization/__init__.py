"""Visual output of a run: preview grids during training, and the final video."""
