"""What every system offers to the training run, and the assembly that systems share.

A system is a plain ``nn.Module``: it can be stepped in a notebook or a test. :mod:`scoredist3d.training` puts it into
Lightning, whose import takes seconds that listing components or checking a config should not cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.config import ComponentConfig, component, under
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.priors.base import CFGConditions
from scoredist3d.seeding import Rng
from scoredist3d.systems.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from scoredist3d.cameras import Cameras
    from scoredist3d.config.experiment import PreviewConfig, TurntableConfig
    from scoredist3d.meshes.exportable import Shape


@dataclass(frozen=True)
class TrainingStep:
    """What one forward pass hands to the optimiser and to the log.

    Attributes:
        loss: Scalar to differentiate.
        scalars: Values to log; detached one-element tensors stay on their device until they are written.
    """

    loss: Tensor
    scalars: dict[str, Tensor | float]


class System(nn.Module, ABC):
    """What is optimised under a frozen prior.

    The prior is held outside of the module tree: it is in no ``state_dict``, no checkpoint and no optimiser.
    """

    @dataclass
    class Config(ComponentConfig):
        """Blocks that every system has."""

        optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, metadata={"help": "Adam and its rates."})

    video_name: str
    """File stem of the video that :meth:`frames` fills."""
    label_rows: bool = False
    """Whether preview grids name their rows."""

    def __init__(self, config: Config, *, prior: nn.Module) -> None:
        super().__init__()
        self.config = config
        prior.requires_grad_(False).eval()
        self._outside_the_tree = (prior,)

    @property
    def prior(self) -> Any:
        """The frozen diffusion model."""
        return self._outside_the_tree[0]

    @abstractmethod
    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """One forward pass; everything random comes from ``rng`` and ``step``."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups ``{"name", "params"}``, named ``<block>`` or ``<block>.<part>``."""

    @abstractmethod
    def preview(self, config: PreviewConfig) -> dict[str, Tensor]:
        """Rows of a preview grid: name to (B, H, W, 3) in [0, 1], the same B in every row."""

    @abstractmethod
    def frames(self, config: TurntableConfig, snapshots: Sequence[Path]) -> Iterator[Tensor]:
        """(H, W, 3) frames in [0, 1] of the final video; ``snapshots`` are the run's preview images, oldest first."""

    def video_cameras(self, config: TurntableConfig) -> Cameras | None:
        """The cameras of the final video, one per frame; None where it shows no object."""
        return None

    def shapes(self) -> Sequence[Shape]:
        """The objects, for exporters; none where the system makes images."""
        return ()

    @property
    def steps_everything(self) -> bool:
        """Whether every step gives every trained parameter a gradient."""
        return True

    @property
    def grows(self) -> bool:
        """Whether parameters may change their sizes while training."""
        return False

    def init_from(self, state: Mapping[str, Any], system: Any = None) -> None:
        """Take over the representation of another run: its ``state_dict`` and its ``system`` block.

        Raises:
            ValueError: This system cannot, or the state holds another representation.
        """
        raise ValueError("system.init_from: this system cannot start from another run")

    def check_finite(self) -> None:
        """Wait for the answers of the guidances' finite checks.

        Raises:
            NonFiniteError: One of them is negative.
        """
        for module in self.modules():
            if isinstance(module, Guidance):
                module.check_finite()

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Set what depends on the step before its first forward pass; ``rng`` is the one that all ranks share."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """After the optimiser's update of ``step``; ``rng`` is the one that all ranks share."""

    def restore_step(self, step: int) -> None:
        """Set what is a function of the step alone (levels), for evaluation of a loaded checkpoint."""

    def to_device(self, device: torch.device) -> None:
        """Move everything, the prior included (Lightning moves only what is in the module tree)."""
        self.prior.to(device)
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Where the representation is."""
        return next(self.parameters()).device


class GuidedSystem(System):
    """Prompt and guidance around a representation that subclasses add.

    What a guidance trains (VSD's second network) is in the ``state_dict`` but in no parameter group: it steps itself,
    with an optimiser whose state is in its ``get_extra_state``.
    """

    @dataclass
    class Config(System.Config):
        """Blocks of systems with one guidance."""

        guidance: ComponentConfig = component("guidance", "sds", "How the prior's prediction becomes a gradient.")
        prompt_processor: ComponentConfig = component(
            "prompt-processor", "view-dependent", "From text to conditioning."
        )

    def __init__(
        self,
        config: Config,
        *,
        prior: nn.Module,
        prompt: str,
        negative_prompt: str = "",
        cameras: Any = None,
        rng: Rng | None = None,
    ) -> None:
        """Args:
        config: Options.
        prior: The diffusion model; it is frozen.
        prompt: Description of the result.
        negative_prompt: Replaces the empty prompt in guidance.
        cameras: :class:`~scoredist3d.data.base.CameraSampler` of the training views, for systems that render.
        rng: Draws initial values; ``Rng()`` if not given.
        """
        super().__init__(config, prior=prior)
        with under("guidance"):
            self.guidance = registry.build(config.guidance, prior=prior, rng=rng)
        self.prompts = registry.build(
            config.prompt_processor,
            prior=prior,
            prompt=prompt,
            negative_prompt=negative_prompt,
            extra=self.guidance.extra_prompts(prompt),
        )

    def guide(self, latents: Tensor, conditions: CFGConditions, step: int, rng: Rng, **extras: Any) -> TrainingStep:
        """The guidance's loss and its log entries; ``extras`` as in the guidance's call."""
        with under("guidance"):
            output = self.guidance(latents, conditions, step, rng, **extras)
        config: Any = self.config
        weight = config.guidance.weight(step)
        scalars: dict[str, Tensor | float] = {f"guidance/{key}": value for key, value in output.diagnostics.items()}
        if weight != 0.0:
            scalars["loss/guidance"] = output.loss.detach() / weight
        scalars["weighted/guidance"] = output.loss.detach()
        return TrainingStep(output.loss, scalars)


def named_groups(block: str, module: nn.Module) -> list[dict[str, Any]]:
    """A block's parameter groups, the block's name in front: ``geometry`` + ``encoding`` -> ``geometry.encoding``."""
    own: Any = getattr(module, "parameter_groups", None)
    groups = own() if own is not None else [{"name": block, "params": list(module.parameters())}]
    return [
        {"name": group["name"] if group["name"] == block else f"{block}.{group['name']}", "params": group["params"]}
        for group in groups
    ]
