"""scoredist3d: text-to-3D by score distillation.

Importing the package is cheap: it sets one environment variable and loads no device, no torch and no optional package.
Components live in sub-packages named after their kind (``scoredist3d.guidance``, ``scoredist3d.geometry``, ...) and are
found through :mod:`scoredist3d.registry`. The names below are loaded at first use.

* :func:`build` constructs the component that a ``Config`` describes; :func:`fit` optimizes a system built in Python.
* The usual components under short names, e.g. ``SDS.Config(guidance_scale=5)``, ``TextTo3D``, ``ImplicitVolume``.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scoredist3d.config.building import build
    from scoredist3d.training.plain_loop import fit

# Waiting OpenMP threads must sleep, not spin: with another process busy on a 2-core machine, libgomp's spinning
# barriers made a small UNet 38 times slower. The variable is read when torch loads, so it is set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_LAZY = {
    "build": "config.building:build",
    "fit": "training.plain_loop:fit",
    "Rng": "seeding:Rng",
    "TextTo2D": "systems.text_to_2d:TextTo2D",
    "TextTo3D": "systems.text_to_3d:TextTo3D",
    "DiffusersPrior": "priors.diffusers_prior:DiffusersPrior",
    "GaussianMixturePrior": "priors.analytic:GaussianMixturePrior",
    "RandomCamera": "data.random_camera:RandomCamera",
    "DMTet": "geometry.dmtet:DMTet",
    "FlexiCubes": "geometry.flexicubes:FlexiCubes",
    "Gaussians": "geometry.gaussians.model:Gaussians",
    "ImageCanvas": "geometry.image_canvas:ImageCanvas",
    "ImplicitSDF": "geometry.implicit_sdf:ImplicitSDF",
    "ImplicitVolume": "geometry.implicit_volume:ImplicitVolume",
    "TexturedMesh": "geometry.textured_mesh:TexturedMesh",
    "ASD": "guidance.asd:AdversarialScoreDistillation",
    "AsyncSD": "guidance.async_sd:AsynchronousScoreDistillation",
    "Bridge": "guidance.bridge:Bridge",
    "CFD": "guidance.cfd:ConsistentFlowDistillation",
    "CSD": "guidance.csd:ClassifierScoreDistillation",
    "CollaborativeSD": "guidance.collaborative:CollaborativeScoreDistillation",
    "Consistent3D": "guidance.consistent3d:ConsistencyDistillationSampling",
    "DDS": "guidance.dds:DeltaDenoising",
    "DSD": "guidance.dsd:DiverseScoreDistillation",
    "ESD": "guidance.esd:EntropicScoreDistillation",
    "FSD": "guidance.fsd:FlowScoreDistillation",
    "HiFA": "guidance.hifa:HiFA",
    "ISM": "guidance.ism:IntervalScoreMatching",
    "LMC": "guidance.lmc:ManifoldCorrective",
    "NFSD": "guidance.nfsd:NoiseFreeScoreDistillation",
    "PDS": "guidance.pds:PosteriorDistillation",
    "PFD": "guidance.pfd:ProbabilityFlowDistillation",
    "RFDS": "guidance.rfds:RectifiedFlowDistillation",
    "SDI": "guidance.sdi:ScoreDistillationViaInversion",
    "SDS": "guidance.sds:ScoreDistillationSampling",
    "SJC": "guidance.sjc:ScoreJacobianChaining",
    "VSD": "guidance.vsd:VariationalScoreDistillation",
}
"""Public name -> module and name inside the package."""

__all__ = ["__version__", "build", "fit"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
