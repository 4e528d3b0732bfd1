"""Shared code of the distillation methods: base classes, step contexts, score models, trajectories, noise fields."""
