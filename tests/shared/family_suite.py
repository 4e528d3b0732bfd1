"""The tests that every family of priors passes; a test file states its family and derives a class from them.

    FAMILY = FamilyCase(build_pixart, PixArtSigmaPipeline, "MaskedTransformer", ...)

    class TestFamily(FamilySuite):
        ...

The fixtures ``family``, ``folder``, ``pipeline`` and ``prior`` of ``tests/priors/conftest.py`` belong to that family.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from shared.family_checks import (
    KEY,
    LONG,
    METHOD_CASES,
    copy_with,
    images,
    load,
    reference_pipeline,
    train,
    truncated,
)

MOST_LINES = 120


def scaled_latents(vae: Any, x: Tensor) -> Tensor:
    """Latents of images (B, 3, H, W) in [-1, 1], with the scale and the shift of the autoencoder."""
    return (vae.encode(x).latent_dist.mode() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def scaled_images(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in about [-1, 1] of such latents."""
    return vae.decode(latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)).sample


@dataclass(frozen=True)
class FamilyCase:
    """A family of priors and what differs in its tests.

    Attributes:
        build: Writes a folder of the family.
        pipeline: Class of diffusers' pipeline.
        denoiser: Name of the class of the denoiser.
        default_size: Side of the images if the configuration names none.
        latents: Shape of the latents of 16 x 8 pixels.
        limit: Number of tokens in the warning about a long prompt.
        tokens: Number of tokens of a text embedding, if it is another one.
        refused: Changes of the index, and the error messages that they cause.
        image_size: The option ``prior.image_size`` of the fixture ``prior``.
        parts: Networks with weights.
        automatic: The precision that auto means.
        pipeline_options: Options of the pipeline's ``from_pretrained``.
        prepare: Changes the pipeline after it was loaded.
        other_sibling: Error message if the embedded model is the second model of a method, as a regular expression; by
            default, that it has no network of the class.
        encode: Latents of channels-first images in [-1, 1], by the pipeline's autoencoder (None for models of pixels).
        decode: The inverse of ``encode``.
    """

    build: Callable[[Path], Path]
    pipeline: Any
    denoiser: str
    default_size: int
    latents: tuple[int, int, int]
    limit: int
    refused: Sequence[tuple[Mapping[str, Any], str]]
    tokens: int | None = None
    image_size: int | None = None
    parts: Sequence[str] = ("transformer", "vae", "text_encoder")
    automatic: str = "auto"
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda pipeline: None
    other_sibling: str | None = None
    encode: Callable[[Any, Tensor], Tensor] = scaled_latents
    decode: Callable[[Any, Tensor], Tensor] = scaled_images

    def load(self, folder: Path, **options: Any) -> DiffusersPrior:
        """The prior of a folder of the family, with images of :attr:`image_size`."""
        return load(folder, **{"image_size": self.image_size, **options})

    def reference(self, folder: Path) -> Any:
        """The pipeline of a folder of the family."""
        pipeline = reference_pipeline(self.pipeline, folder, **self.pipeline_options)
        self.prepare(pipeline)
        return pipeline


class FamilySuite:
    """Tests of every family; derive a class from it in a module with ``FAMILY``."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test for each part, and for each change of the index, of the module's family."""
        family: FamilyCase = metafunc.module.FAMILY
        if "part" in metafunc.fixturenames:
            metafunc.parametrize("part", family.parts)
        if "refusal" in metafunc.fixturenames:
            metafunc.parametrize("refusal", family.refused, ids=[message for _, message in family.refused])

    def test_the_family_is_recognized_and_short(self, family: FamilyCase, folder: Path, prior: DiffusersPrior) -> None:
        assert type(prior.denoiser).__name__ == family.denoiser
        assert prior.image_size == (family.image_size or family.default_size)
        assert prior.latent_shape(16, 8) == family.latents
        assert load(folder).image_size == family.default_size
        assert prior.denoiser._precision == family.automatic
        assert load(folder, precision="fp16").dtype == torch.float16
        module = importlib.import_module(type(prior.denoiser).__module__)
        assert len(Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()) <= MOST_LINES

    def test_images_and_latents_are_the_pipelines(
        self, family: FamilyCase, prior: DiffusersPrior, pipeline: Any
    ) -> None:
        rgb, vae = images(prior.image_size), getattr(pipeline, "vae", None)
        with torch.no_grad():
            latents = family.encode(vae, 2.0 * rgb.movedim(-1, 1) - 1.0)
            torch.testing.assert_close(prior.encode(rgb), latents)
            decoded = 0.5 * family.decode(vae, latents) + 0.5
            torch.testing.assert_close(prior.decode(latents), decoded.movedim(1, -1))
        rgb.requires_grad_()
        prior.encode(rgb).square().sum().backward()
        assert rgb.grad is not None and bool(rgb.grad.isfinite().all()) and bool(rgb.grad.any())

    @pytest.mark.parametrize("method", METHOD_CASES)
    def test_methods_distil_from_it(self, method: str, prior: DiffusersPrior) -> None:
        train(prior, method)

    def test_a_long_prompt_is_cut_with_one_warning(
        self, family: FamilyCase, prior: DiffusersPrior, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            cut = prior.embed([LONG])
        assert cut.text.shape[1] == (family.tokens or family.limit) and (cut.mask is None or cut.mask.all())
        assert len(caplog.records) == 1
        assert f"longer than the prior's limit of {family.limit} tokens" in caplog.text

    def test_a_truncated_file_is_named(self, part: str, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(PriorError, match=rf"{KEY}the {part} of .* cannot be loaded"):
            load(truncated(folder, tmp_path / "cut", part))

    def test_other_pipelines_are_named(
        self, refusal: tuple[Mapping[str, Any], str], folder: Path, tmp_path: Path
    ) -> None:
        changes, message = refusal
        with pytest.raises(PriorError, match=rf"{KEY}.*{message}"):
            load(copy_with(folder, tmp_path / "other", **changes))

    def test_a_model_of_another_family_is_no_sibling(
        self, family: FamilyCase, folder: Path, prior: DiffusersPrior
    ) -> None:
        assert prior.sibling(str(folder), key="guidance.phi.model").channels == prior.denoiser.channels
        message = f"has no {prior.denoiser.part} of class {(*prior.denoiser.networks, '')[0]}"
        with pytest.raises(PriorError, match=rf"guidance\.phi\.model: .* {family.other_sibling or message}"):
            prior.sibling("embedded", key="guidance.phi.model")
