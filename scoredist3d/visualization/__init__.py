"""Images for people: preview grids during training and the final video."""
