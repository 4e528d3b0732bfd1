"""View-dependent prompting, negative prompts and Perp-Neg; each text is embedded once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, option
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.prompts.debias import VIEW_WORDS, MaskedLanguageModel, debiased_prompts
from scoredist3d.prompts.wording import refuse_or_warn
from scoredist3d.registry import register

_log = logging.getLogger(__name__)

VIEWS = VIEW_WORDS
_FRONT, _SIDE, _BACK, _OVERHEAD = range(len(VIEWS))
_PLAIN, _NEGATIVE, _EMPTY = range(len(VIEWS), len(VIEWS) + 3)


@dataclass(frozen=True)
class ExtraPrompt:
    """An additional prompt of a distillation method, e.g. the source prompt of an edit.

    Attributes:
        text: The complete prompt.
        view_words: Whether view words are appended to it as to the main prompt.
    """

    text: str
    view_words: bool = True


@register(
    "prompt-processor",
    "view-dependent",
    summary="View words by camera angle, negative prompts, optional Perp-Neg and prompt debiasing.",
    arxiv="2209.14988",
)
class PromptProcessor:
    """Computes the guidance conditions of a batch of cameras; the texts are embedded once, at the first call.

    View words are chosen by the camera angles: "overhead view" if the elevation exceeds the overhead threshold,
    otherwise "front view" if |azimuth| is below the front threshold, "back view" if it exceeds 180 degrees minus the
    back threshold, and "side view" elsewhere. Without cameras, the prompt is used unchanged.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of view words, their angular sectors, Perp-Neg and prompt debiasing."""

        view_dependent: Literal["auto", "always", "never"] = option(
            "auto",
            "Append view words to the prompt; auto omits them if the prior is conditioned on cameras.",
        )
        front_suffix: str = option(", front view", "Appended to the prompt in front views.")
        side_suffix: str = option(", side view", "Appended to the prompt in side views.")
        back_suffix: str = option(", back view", "Appended to the prompt in back views.")
        overhead_suffix: str = option(", overhead view", "Appended to the prompt in overhead views.")
        front_threshold: float = option(
            45.0, "Half the width of the front sector, in degrees of azimuth.", ge=0, le=180
        )
        back_threshold: float = option(45.0, "Half the width of the back sector, in degrees of azimuth.", ge=0, le=180)
        overhead_threshold: float = option(
            60.0, "Elevation above which a view is an overhead view, in degrees.", ge=-90, le=90
        )
        perp_neg: bool = option(
            False, "Perp-Neg: interpolate the view prompts, and use those of other views as negative prompts."
        )
        perp_neg_side_back: tuple[float, float, float] = option(
            (1.0, 0.5, -0.606),
            "Coefficients a, b, c of the side prompt's weight, a exp(-b r) + c, in views between side and back.",
        )
        perp_neg_front_behind: tuple[float, float, float] = option(
            (1.0, 0.5, 0.967), "Coefficients a, b, c of the front prompt's weight in views between side and back."
        )
        perp_neg_front_side: tuple[float, float, float] = option(
            (4.0, 0.5, -2.426), "Coefficients a, b, c of the front prompt's weight in views between front and side."
        )
        perp_neg_side_front: tuple[float, float, float] = option(
            (4.0, 0.5, -2.426), "Coefficients a, b, c of the side prompt's weight in views between front and side."
        )
        debias_model: str | None = option(
            None,
            "Masked language model (folder or hub id, e.g. bert-base-uncased) for the prompt debiasing of D-SDS "
            "(arXiv 2303.15413), which removes words that contradict a view. For the score debiasing of D-SDS, "
            "use an increasing guidance.grad_clip.",
        )
        debias_words: list[str] | None = option(None, "Words that debiasing may remove; null means all words.")
        debias_threshold: float = option(
            0.95,
            "A word is removed if P / (0.5 P + 0.5 Q) is below this, where P and Q are the probabilities of the view "
            "given the prompt with and without the word.",
            ge=0,
            le=1,
        )

        def validate(self) -> list[str]:
            """Check that sectors do not overlap and that Perp-Neg and debiasing have view words."""
            problems = []
            if self.front_threshold + self.back_threshold > 180:
                problems.append(
                    f"front_threshold: {self.front_threshold} and back_threshold {self.back_threshold} overlap; "
                    "their sum must be at most 180"
                )
            if self.perp_neg and self.view_dependent == "never":
                problems.append("perp_neg: requires view words; set view_dependent to always")
            if self.debias_model and self.view_dependent == "never":
                problems.append("debias_model: requires view words; set view_dependent to always")
            return problems

    def __init__(
        self,
        config: Config,
        *,
        prior: Prior,
        prompt: str,
        negative_prompt: str = "",
        extra: Mapping[str, ExtraPrompt] | None = None,
    ) -> None:
        """Args:
        config: Options of the processor.
        prior: The prior that embeds the texts.
        prompt: Description of the object. Words that the prior does not know are reported in one warning.
        negative_prompt: Replaces the empty prompt in guidance.
        extra: Additional prompts of the distillation method, keyed by name.

        Raises:
            ValueError: An additional prompt has a name that the processor reserves; or the prompt names no kind of
                object that the prior knows, and the prior does not allow this.
        """
        self.config = config
        self.prompt, self.negative_prompt, self.extra = prompt, negative_prompt, dict(extra or {})
        taken = sorted(self.extra.keys() & {*VIEWS, "plain", "negative", "empty"})
        if taken:
            raise ValueError(f"the name {taken[0]!r} of an extra prompt is reserved; choose another name")
        self._prior = prior
        self._cache: dict[str, Conditioning] = {}
        self._table: Conditioning | None = None
        if config.perp_neg and not self.uses_view_words:
            _log.warning(
                "Perp-Neg is disabled: the prior is conditioned on cameras; set view_dependent to always to use it"
            )
        self._view_prompts = self._debiased()
        refuse_or_warn(prior, prompt, negative_prompt)

    @property
    def uses_view_words(self) -> bool:
        """Whether view words are appended to prompts."""
        choice = self.config.view_dependent
        return choice == "always" or (choice == "auto" and not self._prior.takes_cameras)

    @property
    def texts(self) -> dict[str, str]:
        """The prompts by role: each view, ``plain``, ``negative``, ``empty`` and the additional prompts."""
        config = self.config
        suffixes = (config.front_suffix, config.side_suffix, config.back_suffix, config.overhead_suffix)
        added = suffixes if self.uses_view_words else ("",) * len(VIEWS)
        views = {view: self._view_prompts[view] + suffix for view, suffix in zip(VIEWS, added, strict=True)}
        texts = {**views, "plain": self.prompt, "negative": self.negative_prompt, "empty": ""}
        for name, extra in self.extra.items():
            own = added if extra.view_words else ("",) * len(VIEWS)
            texts |= {f"{name}, {view}": extra.text + suffix for view, suffix in zip(VIEWS, own, strict=True)}
            texts[name] = extra.text
        return texts

    def __call__(self, cameras: Cameras | None = None, batch: int | None = None) -> CFGConditions:
        """The guidance conditions of a batch.

        Args:
            cameras: One camera per image; the call does not synchronize with their device.
            batch: Number of images if ``cameras`` is None (default 1).
        """
        count = (1 if batch is None else batch) if cameras is None else len(cameras)
        table = self._embedded()
        camera = self._prior.camera_condition(cameras, count)

        def fixed(row: int) -> Conditioning:
            return _with_camera(table[row : row + 1].expand(count), camera)

        plain, unconditional, empty = fixed(_PLAIN), fixed(_NEGATIVE), fixed(_EMPTY)
        first = _EMPTY + 1  # each extra prompt has one row per view, followed by one for the text without view words
        blocks = {name: first + index * (len(VIEWS) + 1) for index, name in enumerate(self.extra)}
        if cameras is None or not self.uses_view_words:
            extra = {name: fixed(row + len(VIEWS)) for name, row in blocks.items()}
            return CFGConditions(plain, unconditional, plain=plain, empty=empty, cameras=cameras, extra=extra)
        view = self.view_indices(cameras).to(table.text.device)
        extra = {name: _with_camera(table[row + view], camera) for name, row in blocks.items()}
        if self.config.perp_neg:
            positive, negatives = self._perp_neg(cameras, table, camera)
            return CFGConditions(
                positive, unconditional, negatives, plain=plain, empty=empty, cameras=cameras, extra=extra
            )
        positive = _with_camera(table[view], camera)
        return CFGConditions(positive, unconditional, plain=plain, empty=empty, cameras=cameras, extra=extra)

    def embed(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of arbitrary texts without cameras, (len(texts), L, D); embeddings are cached by text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if new:
            encoded = self._prior.embed(new)
            for index, text in enumerate(new):
                self._cache[text] = encoded[index : index + 1]
        return Conditioning.cat([self._cache[text] for text in texts])

    def view_indices(self, cameras: Cameras) -> Tensor:
        """Indices (B,) into :data:`VIEWS`, one view per camera."""
        azimuth, elevation = _degrees(cameras)
        view = torch.full_like(azimuth, _SIDE, dtype=torch.long)
        view = torch.where(azimuth < self.config.front_threshold, _FRONT, view)
        view = torch.where(azimuth > 180.0 - self.config.back_threshold, _BACK, view)
        return torch.where(elevation > self.config.overhead_threshold, _OVERHEAD, view)

    def perp_neg_weights(self, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
        """Interpolation and weights of the view prompts in Perp-Neg (arXiv 2304.04968).

        Let f(r) = a exp(-b r) + c. For |azimuth| below 90 degrees, r = 1 - |azimuth| / 90, the positive prompt is
        r front + (1 - r) side, and the weights are -f_front_side(r) and -f_side_front(1 - r). For larger angles,
        r = 2 - |azimuth| / 90, the positive prompt is r side + (1 - r) back, and the weights are -f_front_behind(r) and
        -f_side_back(r). Overhead views have zero weights.

        Returns:
            Interpolation coefficients (B, 4) over :data:`VIEWS`, and the (B,) weights of the front and the side prompt.
        """
        config = self.config
        azimuth, elevation = _degrees(cameras)
        ahead = azimuth < 90.0
        r = torch.where(ahead, 1.0 - azimuth / 90.0, 2.0 - azimuth / 90.0)
        zero = torch.zeros_like(r)
        before = torch.stack([r, 1.0 - r, zero, zero], dim=-1)
        behind = torch.stack([zero, r, 1.0 - r, zero], dim=-1)
        rows = torch.where(ahead[:, None], before, behind)
        front = -torch.where(ahead, _decay(config.perp_neg_front_side, r), _decay(config.perp_neg_front_behind, r))
        side = -torch.where(ahead, _decay(config.perp_neg_side_front, 1.0 - r), _decay(config.perp_neg_side_back, r))
        overhead = elevation > config.overhead_threshold
        rows = torch.where(overhead[:, None], rows.new_tensor([0.0, 0.0, 0.0, 1.0]), rows)
        return rows, torch.where(overhead, zero, front), torch.where(overhead, zero, side)

    def _debiased(self) -> dict[str, str]:
        """The prompt of each view before its view word is appended, debiased if configured."""
        config = self.config
        if config.debias_model is None:
            return dict.fromkeys(VIEWS, self.prompt)
        if not self.uses_view_words:
            _log.warning(
                "prompt debiasing is disabled: the prior is conditioned on cameras; set view_dependent to always to "
                "use it"
            )
            return dict.fromkeys(VIEWS, self.prompt)
        model = MaskedLanguageModel(config.debias_model)
        texts = debiased_prompts(self.prompt, model, threshold=config.debias_threshold, removable=config.debias_words)
        for view, text in texts.items():
            _log.info("debiased prompt of the %s view: %r", view, text)
        return texts

    def _perp_neg(
        self, cameras: Cameras, table: Conditioning, camera: Tensor | None
    ) -> tuple[Conditioning, tuple[tuple[Conditioning, Tensor], ...]]:
        """The interpolated positive prompt, and the front and side prompts with their weights."""
        rows, front, side = (part.to(table.text) for part in self.perp_neg_weights(cameras))
        views = table[: len(VIEWS)]
        pooled = None if views.pooled is None else rows.to(views.pooled.dtype) @ views.pooled
        # Tokens of any of the mixed prompts are attended to.
        mask = None if views.mask is None else ((rows > 0).to(views.mask) @ views.mask).clamp_max(1)
        positive = Conditioning(torch.einsum("bv,vld->bld", rows, views.text), camera, pooled, mask)
        return positive, tuple(
            (_with_camera(table[view : view + 1].expand(len(cameras)), camera), weights)
            for view, weights in ((_FRONT, front), (_SIDE, side))
        )

    def _embedded(self) -> Conditioning:
        """The embeddings of :attr:`texts` in order, on the prior's device at the first call."""
        if self._table is None:
            self._table = self.embed(list(self.texts.values()))
        return self._table


def _degrees(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """|azimuth| in [0, 180] and elevation of the cameras, (B,) each, in degrees."""
    azimuth = torch.remainder(torch.rad2deg(cameras.azimuth) + 180.0, 360.0) - 180.0
    return azimuth.abs(), torch.rad2deg(cameras.elevation)


def _decay(coefficients: tuple[float, float, float], r: Tensor) -> Tensor:
    a, b, c = coefficients
    return a * torch.exp(-b * r) + c


def _with_camera(conditioning: Conditioning, camera: Tensor | None) -> Conditioning:
    return replace(conditioning, camera=camera)
