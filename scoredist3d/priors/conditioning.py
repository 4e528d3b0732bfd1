"""Conditioning inputs of a denoiser, and the set of conditionings that guidance combines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras


@dataclass(frozen=True)
class Conditioning:
    """Conditioning inputs of a denoiser for ``B`` images.

    Attributes:
        text: (B, L, D), text embedding, in the format of the prior that computed it.
        camera: (B, 16), camera embedding from :meth:`~scoredist3d.priors.base.Prior.camera_condition`; zeros where no
            camera is given; None for priors without camera conditioning.
        pooled: (B, P), pooled text embedding, for priors that use one.
        mask: (B, L), 1 for the tokens of the text that the denoiser attends to and 0 for padding, for priors whose
            denoiser uses a mask.
        image: (B, 3, H, W) in about [-1, 1], image that the denoiser refines, for super-resolution models; see
            :meth:`~scoredist3d.priors.base.Prior.with_image`.
    """

    text: Tensor
    camera: Tensor | None = None
    pooled: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Device of the text embedding."""
        return self.text.device

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """The items selected by a slice or an index tensor."""
        return self._map(lambda part: part[index])

    def expand(self, batch: int) -> Conditioning:
        """A single item repeated ``batch`` times without copying; a batch of that size is returned unchanged.

        Raises:
            ValueError: The conditioning has neither one item nor ``batch`` items.
        """
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(
                f"conditioning of {len(self)} items cannot be used for a batch of {batch}; pass 1 or {batch} items"
            )
        return self._map(lambda part: part.expand(batch, *part.shape[1:]))

    def without_camera(self) -> Conditioning:
        """The same text with a zero camera embedding, which means "no camera" to the trained network."""
        return self if self.camera is None else replace(self, camera=torch.zeros_like(self.camera))

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The concatenation of several batches.

        Raises:
            ValueError: A field is set in some batches and None in others.
        """
        joined: dict[str, Any] = {}
        for part_field in fields(cls):
            name = part_field.name
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values) and any(value is not None for value in values):
                raise ValueError(
                    f"cannot concatenate conditionings: {name} is given in some and missing in others; "
                    "make them all with the same prior"
                )
            joined[name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: function(part) for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class CFGConditions:
    """Conditionings that guidance combines, each with ``B`` items or with one item for the whole batch.

    Attributes:
        positive: The prompt, including view words if view-dependent prompting is enabled.
        unconditional: The negative prompt, or the empty prompt if there is none.
        negatives: Perp-Neg's additional negative prompts and their (B,) weights (negative numbers).
        plain: The prompt without view words, used by the score models of variational methods; None means ``positive``.
        empty: The empty prompt; None means ``unconditional``.
        cameras: Cameras of the batch, for methods that have their own camera conditioning.
        extra: Additional prompts requested by the method, keyed by the names that it gives them.
    """

    positive: Conditioning
    unconditional: Conditioning
    negatives: tuple[tuple[Conditioning, Tensor], ...] = ()
    plain: Conditioning | None = None
    empty: Conditioning | None = None
    cameras: Cameras | None = None
    extra: Mapping[str, Conditioning] = field(default_factory=dict)

    def map(self, function: Callable[[Conditioning], Conditioning]) -> CFGConditions:
        """The conditions with ``function`` applied to every conditioning."""
        return replace(
            self,
            positive=function(self.positive),
            unconditional=function(self.unconditional),
            negatives=tuple((function(conditioning), weights) for conditioning, weights in self.negatives),
            plain=None if self.plain is None else function(self.plain),
            empty=None if self.empty is None else function(self.empty),
            extra={name: function(conditioning) for name, conditioning in self.extra.items()},
        )
