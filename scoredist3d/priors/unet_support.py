"""Check, before any weights are read, that the diffusers prior supports a UNet's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scoredist3d.priors.camera_embedding import CAMERA_EMBEDDING_SIZE
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.pipeline_family import SUPPORTED

NETWORK = "UNet2DConditionModel"
_OTHER_DENOISERS = ("transformer", "prior", "decoder", "decoder_unet", "prior_prior")
"""Names of the denoisers of other families in the index."""

# Values of a UNet configuration and the inputs that they require. DeepFloyd IF's values, "text" and "text_proj",
# require only the text embedding.
_ADDED_CONDITIONS = {
    "text_time": "pooled text embeddings and image sizes (Kolors, inpainting with Stable Diffusion XL, its refiner)",
    "text_image": "image embeddings (Kandinsky 2.1)",
    "image": "image embeddings (Kandinsky 2.2)",
    "image_hint": "image embeddings and a hint image (Kandinsky 2.2 ControlNet)",
}
_PROJECTED_CONDITIONS = {
    "text_image_proj": "image embeddings (Kandinsky 2.1)",
    "image_proj": "image embeddings (Kandinsky 2.2)",
    "ip_image_proj": "image embeddings (IP-Adapter)",
}
_CLASS_CONDITIONS = {
    "timestep": "a low-resolution image and its timestep (DeepFloyd IF for image editing, upscalers)",
    "projection": "image embeddings (Stable unCLIP)",
}


def check_unet(
    source: PipelineSource, added: tuple[str | None, ...] = (None, "text"), class_embedding: str | None = None
) -> None:
    """Check that the pipeline has a UNet and that it needs only inputs that are provided.

    Args:
        source: The pipeline.
        added: Accepted values of ``addition_embed_type``. None and ``text`` require only a text embedding; a UNet may
            also take a camera.
        class_embedding: Required value of ``class_embed_type`` for a UNet without camera.

    Raises:
        PriorError: The pipeline has no UNet, or one that needs other inputs.
    """
    family = source.index.get("_class_name", "pipeline of unknown class")
    if not source.has("unet"):
        others = [part for part in _OTHER_DENOISERS if source.has(part)]
        denoiser = f"; its denoiser is its {others[0]}, a {source.index[others[0]][1]}" if others else ""
        raise PriorError(f"{source.key}: {source.name} ({family}) has no unet{denoiser}; only {SUPPORTED}")
    config = source.network_config("unet")
    name = source.index["unet"][1]
    if name != NETWORK:
        raise PriorError(
            f"{source.key}: the UNet of {source.name} ({family}) is a {name}, not a {NETWORK}; only {SUPPORTED}"
        )
    needs = _unsupported_condition(config, added, class_embedding)
    if needs is not None:
        raise PriorError(f"{source.key}: the UNet of {source.name} ({family}) needs {needs}; only {SUPPORTED}")


def text_width(config: Mapping[str, Any]) -> int:
    """Size D of the text embedding that the UNet takes as input, before its own projection."""
    return config.get("encoder_hid_dim") or config["cross_attention_dim"]


def takes_cameras(config: Mapping[str, Any]) -> bool:
    """Whether the UNet with this configuration is conditioned on camera embeddings."""
    return (
        config.get("class_embed_type") == "projection"
        and config.get("projection_class_embeddings_input_dim") == CAMERA_EMBEDDING_SIZE
    )


def _unsupported_condition(
    config: Mapping[str, Any], accepted: tuple[str | None, ...], class_embedding: str | None
) -> str | None:
    """A required input of the UNet that the diffusers prior does not provide; None if there is none."""
    added, projected = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    if added not in accepted:
        return _ADDED_CONDITIONS.get(str(added), f"conditions of type addition_embed_type={added}")
    if projected not in (None, "text_proj"):
        return _PROJECTED_CONDITIONS.get(projected, f"conditions of type encoder_hid_dim_type={projected}")
    if config.get("time_cond_proj_dim") is not None:
        return "an embedding of the guidance scale (latent consistency models)"
    if takes_cameras(config):
        return None
    embedding = config.get("class_embed_type")
    if embedding is not None and embedding == class_embedding:
        return None
    if embedding is None:
        return None if config.get("num_class_embeds") is None else "class labels (the Stable Diffusion x4 upscaler)"
    known = _CLASS_CONDITIONS.get(embedding, "class labels")
    inputs = config.get("projection_class_embeddings_input_dim")
    detail = (
        f" with {inputs} inputs; a camera embedding has {CAMERA_EMBEDDING_SIZE}" if embedding == "projection" else ""
    )
    return f"{known}: its class embedding is {embedding}{detail}"
