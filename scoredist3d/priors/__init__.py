"""Diffusion priors: a denoiser, an encoder and a text conditioning behind one interface."""

from scoredist3d.priors.base import (
    CFGConditions,
    Conditioning,
    Prediction,
    Prior,
    guided_prediction,
    predict_each,
)
from scoredist3d.priors.camera_embedding import camera_embedding
from scoredist3d.priors.sampling import denoise, sample

__all__ = [
    "CFGConditions",
    "Conditioning",
    "Prediction",
    "Prior",
    "camera_embedding",
    "denoise",
    "guided_prediction",
    "predict_each",
    "sample",
]
