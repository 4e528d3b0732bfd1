"""Diffusion priors: denoiser, image encoder and text conditioning behind one interface."""

from scoredist3d.diffusion.cfg import guided_prediction, predict_each
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.samplers import denoise, sample
from scoredist3d.priors.base import Prior
from scoredist3d.priors.camera_embedding import camera_embedding
from scoredist3d.priors.conditioning import CFGConditions, Conditioning

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
