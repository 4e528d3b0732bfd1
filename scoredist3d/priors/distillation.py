"""Recognition of models that were distilled for sampling without guidance, by the files of their folders."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from scoredist3d.priors.base import Prior
from scoredist3d.priors.diffusers_loading import PipelineSource

_log = logging.getLogger("scoredist3d")


def distillation_evidence(source: PipelineSource) -> str | None:
    """The entry of a folder's files that distinguishes models without guidance; None if there is none.

    Many distilled models have the same files as their base models, apart from the weights.
    """
    pipeline, scheduler = source.index.get("_class_name"), source.scheduler_config()
    if source.index.get("is_distilled"):
        return "is_distilled in its model_index.json"
    if pipeline == "FluxPipeline" and not source.network_config("transformer").get("guidance_embeds"):
        return "no guidance_embeds in the configuration of its transformer, as in FLUX.1 schnell"
    if "LCM" in str(scheduler.get("_class_name")):
        return "the scheduler of latent consistency models"
    # Models with other predictions, or with no signal at the last timestep, have trailing timesteps for other reasons.
    predicts_noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
    trails = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
    if source.has("unet") and source.has("vae") and predicts_noise and trails:
        return "the trailing timesteps of its scheduler, as in the turbo variants of Stable Diffusion"
    return None


def warn_about_guidance(prior: Prior, scales: Iterable[float]) -> None:
    """Log one warning if the prior was distilled for sampling without guidance and a guidance scale is not 1.

    Args:
        prior: The prior of the run, which remembers the warning.
        scales: Values of the guidance scale during the run.
    """
    used = next((scale for scale in scales if scale != 1.0), None)
    if prior.distilled is None or used is None or prior.distilled in prior.given_warnings:
        return
    prior.given_warnings.add(prior.distilled)
    _log.warning(
        "the prior seems to be distilled for sampling without guidance (it has %s), but guidance_scale is %g; set it "
        "to 1, or ignore this warning if the model was trained with guidance",
        prior.distilled,
        used,
    )
