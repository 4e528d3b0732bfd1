"""Counts the network evaluations of a method for the benchmark ``methods.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Counter:
    """Counts the network evaluations of a method.

    Attributes:
        prior: Evaluations of the frozen denoiser, counted.
        declared: Evaluations of the frozen denoiser that the method's ``nfe`` declares.
        own: Evaluations of the method's own networks, as declared.
        images: Number of images for which gradients were computed.
    """

    system: Any
    prior: int = 0
    declared: int = 0
    own: int = 0
    images: int = 0

    @contextmanager
    def counting(self) -> Iterator[Counter]:
        """Count the evaluations of the guidance inside the ``with`` block."""
        prior, guidance = self.system.prior, self.system.guidance
        predict, forward, score_gradient = prior.predict, guidance.forward, guidance.score_gradient
        phi = getattr(guidance, "phi", None)
        phi_predict = getattr(phi, "predict", None)
        inside = False

        def counted(x_t: Tensor, t: Tensor, conditioning: Any) -> Any:
            self.prior += inside * len(x_t)
            return predict(x_t, t, conditioning)

        def entered(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside  # sampling the initial images is not part of the method
            inside = True
            try:
                return forward(*args, **kwargs)
            finally:
                inside = False

        def own_network(*args: Any) -> Any:
            nonlocal inside  # adapters call the prior's network, but count as own
            outer, inside = inside, False
            try:
                return phi_predict(*args)  # type: ignore[misc]
            finally:
                inside = outer

        def asked(z: Tensor, conditions: Any, step: Any) -> Any:
            nfe = guidance.nfe(conditions, step)
            self.declared += nfe.prior * len(z)
            self.own += nfe.own * len(z)
            self.images += len(z)
            return score_gradient(z, conditions, step)

        prior.predict, guidance.forward, guidance.score_gradient = counted, entered, asked
        if phi is not None:
            phi.predict = own_network
        try:
            yield self
        finally:
            del prior.predict, guidance.forward, guidance.score_gradient
            if phi is not None:
                del phi.predict

    def per_image(self) -> dict[str, float]:
        """Mean number of evaluations per image and step."""
        images = max(1, self.images)
        return {
            "prior_nfe": self.prior / images,
            "declared_nfe": self.declared / images,
            "own_nfe": self.own / images,
        }
