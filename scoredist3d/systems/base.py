"""Base classes of systems, and the assembly of components that systems share.

A system is a plain ``nn.Module`` that a notebook or a test can step directly. :mod:`scoredist3d.training` wraps it in a
Lightning module. Lightning takes seconds to import and is not imported here, so that listing components or checking a
config stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.config import ComponentConfig, component, under
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.data.base import CameraSampler
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.priors.distillation import warn_about_guidance
from scoredist3d.prompts.processor import PromptProcessor
from scoredist3d.reasons import part
from scoredist3d.seeding import Rng

if TYPE_CHECKING:
    from scoredist3d.meshes.exportable import Exportable


@dataclass(frozen=True)
class TrainingStep:
    """Result of one forward pass of a system.

    Attributes:
        loss: Scalar to differentiate.
        scalars: Values to log, by name; detached one-element tensors stay on their device until they are written.
    """

    loss: Tensor
    scalars: dict[str, Tensor | float]


@dataclass(frozen=True)
class SystemInputs:
    """Inputs from which a system is built, in addition to its config and the prior.

    Attributes:
        prompt: Description of the result.
        negative_prompt: Prompt that replaces the empty prompt in guidance.
        cameras: Sampler of the training views, for systems that render; None selects the default sampler.
        rng: Random streams from which initial values are drawn.
    """

    prompt: str
    negative_prompt: str
    cameras: CameraSampler | None
    rng: Rng


class System(nn.Module, ABC):
    """Base class of systems: the representation and objective of a run with a frozen prior.

    The prior is kept outside the module tree, so no ``state_dict``, checkpoint or optimizer contains it. Previews and
    videos need one of the protocols of :mod:`scoredist3d.systems.interfaces`.
    """

    @dataclass
    class Config(ComponentConfig):
        """Config blocks that every system has."""

        optimizer: OptimizerConfig = field(
            default_factory=OptimizerConfig, metadata={"help": "Optimizer and its learning rates."}
        )

    def __init__(
        self,
        config: Config,
        *,
        prior: Prior,
        prompt: str,
        negative_prompt: str = "",
        cameras: CameraSampler | None = None,
        rng: Rng | None = None,
    ) -> None:
        """Args:
        config: Options of the system.
        prior: The diffusion model; it is frozen.
        prompt, negative_prompt, cameras: See :class:`SystemInputs`.
        rng: Random streams from which initial values are drawn; None means ``Rng()``.
        """
        super().__init__()
        self.config = config
        prior.requires_grad_(False).eval()
        self._prior = Unregistered(prior)
        self.assemble(SystemInputs(prompt, negative_prompt, cameras, rng or Rng()))

    @abstractmethod
    def assemble(self, inputs: SystemInputs) -> None:
        """Build the modules of the system from its config; called by the constructor."""

    @property
    def prior(self) -> Prior:
        """The frozen diffusion model."""
        return self._prior.value

    @abstractmethod
    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """Loss and values to log of one forward pass; all randomness is derived from ``rng`` and ``step``."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups ``{"name", "params"}``, named ``<block>`` or ``<block>.<part>``."""

    def shapes(self) -> Sequence[Exportable]:
        """The 3D objects for exporters; empty for a system that optimizes images."""
        return ()

    @property
    def steps_everything(self) -> bool:
        """Whether every step gives every trained parameter a gradient."""
        return True

    @property
    def densifies(self) -> bool:
        """Whether parameters may change in size during training (adaptive density control)."""
        return False

    def init_from(self, state: Mapping[str, Any], system: ComponentConfig | None = None) -> None:
        """Initialize the representation from another run.

        Args:
            state: The ``state_dict`` of that run.
            system: The ``system`` block of that run.

        Raises:
            ValueError: The system does not support this, or the representation in ``state`` cannot be used.
        """
        raise ValueError("system.init_from: this system cannot start from another run; remove the option")

    def check_finite(self) -> None:
        """Wait for the results of the guidances' pending checks for NaN and infinity.

        Raises:
            NonFiniteError: A check found a non-finite value.
        """
        for module in self.modules():
            if isinstance(module, Guidance):
                module.check_finite()

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Update step-dependent state before the first forward pass of ``step``; all ranks share ``rng``."""

    def post_backward(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """Densify the representation after the optimizer's update of ``step``; all ranks share ``rng``."""

    def restore_step(self, step: int) -> None:
        """Set the state that depends only on the step, to evaluate a checkpoint saved after ``step`` steps."""

    def to_device(self, device: torch.device) -> None:
        """Move the system and its prior; Lightning moves only the module tree, which does not contain the prior."""
        self.prior.to(device)
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device


class GuidedSystem(System):
    """A system with one prompt and one guidance; subclasses add the representation.

    Networks that a guidance trains (VSD's second network) are in the ``state_dict`` but in no parameter group: the
    guidance steps them with an optimizer of its own, whose state is in its ``get_extra_state``.
    """

    @dataclass
    class Config(System.Config):
        """Config blocks of systems with one guidance."""

        guidance: ComponentConfig = component("guidance", "sds", "Turns the prior's prediction into a gradient.")
        prompt_processor: ComponentConfig = component(
            "prompt-processor", "view-dependent", "Turns the prompt into conditioning."
        )

    config: Config

    def assemble(self, inputs: SystemInputs) -> None:
        """Build guidance and prompt processor."""
        config = self.config
        with under("guidance"):
            self.guidance: Guidance = registry.build(config.guidance, prior=self.prior, rng=inputs.rng)
        warn_about_guidance(self.prior, self.guidance.config.guidance_scale.values)
        self.prompts: PromptProcessor = registry.build(
            config.prompt_processor,
            prior=self.prior,
            prompt=inputs.prompt,
            negative_prompt=inputs.negative_prompt,
            extra=self.guidance.extra_prompts(inputs.prompt),
        )

    def guide(
        self,
        latents: Tensor,
        conditions: CFGConditions,
        step: int,
        rng: Rng,
        *,
        particles: Sequence[int],
        rgb: Tensor | None = None,
        opacity: Tensor | None = None,
        depth: Tensor | None = None,
        source: Tensor | None = None,
        background: Tensor | None = None,
        normal: Tensor | None = None,
    ) -> TrainingStep:
        """The guidance's loss and values to log; the arguments are those of :meth:`Guidance.forward`."""
        conditions = self.prior.with_image(conditions, latents, rng("condition", step, latents.device))
        with under("guidance"), part("the guidance"):
            output = self.guidance(
                latents,
                conditions,
                step,
                rng,
                rgb=rgb,
                opacity=opacity,
                depth=depth,
                particles=particles,
                source=source,
                background=background,
                normal=normal,
            )
        weight = self.guidance.config.weight(step)
        scalars: dict[str, Tensor | float] = {f"guidance/{key}": value for key, value in output.diagnostics.items()}
        if weight != 0.0:
            scalars["loss/guidance"] = output.loss.detach() / weight
        scalars["weighted/guidance"] = output.loss.detach()
        return TrainingStep(output.loss, scalars)


def named_groups(block: str, module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of a module, prefixed with its block: ``geometry`` + ``encoding`` -> ``geometry.encoding``."""
    own: Any = getattr(module, "parameter_groups", None)
    groups = own() if own is not None else [{"name": block, "params": list(module.parameters())}]
    return [
        {"name": group["name"] if group["name"] == block else f"{block}.{group['name']}", "params": group["params"]}
        for group in groups
    ]
