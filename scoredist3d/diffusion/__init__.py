"""Diffusion mathematics independent of any model family: schedules, predictions, guidance algebra and samplers."""
