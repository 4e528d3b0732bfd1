"""Diffusion priors: a denoiser, an encoder and a text conditioning behind one interface."""

from scoredist3d.priors.base import (
    Branches,
    Conditioning,
    Prediction,
    Prior,
    guided_prediction,
    predict_branches,
)
from scoredist3d.priors.camera_embedding import camera_embedding
from scoredist3d.priors.sampling import denoise, sample

__all__ = [
    "Branches",
    "Conditioning",
    "Prediction",
    "Prior",
    "camera_embedding",
    "denoise",
    "guided_prediction",
    "predict_branches",
    "sample",
]
