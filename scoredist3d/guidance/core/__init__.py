"""What distillation methods share: base classes, steps, score models, trajectories, noise fields."""
