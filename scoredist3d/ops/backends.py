"""Which implementation of an operator runs.

``auto`` takes the first usable of the operator's candidates for the device: CUDA prefers Triton, the CPU prefers native
C, and both end at torch. The choice is logged once per operator and device. A backend asked for by name that cannot run
raises, saying what to install.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

from scoredist3d.ops import native

logger = logging.getLogger("scoredist3d")

_INSTALL = {
    "triton": "pip install triton (Linux; CUDA builds of torch bring it)",
    "nerfacc": "pip install nerfacc",
    "tinycudann": "see requirements-cuda.txt",
    "nvdiffrast": "see requirements-cuda.txt",
    "gsplat": "pip install gsplat (its kernels are compiled at first use and need nvcc)",
}
_AUTO = {"cuda": ("triton", "torch"), "cpu": ("native", "torch")}


def choose(op: str, requested: str, device: torch.device, supported: tuple[str, ...], dtype: torch.dtype) -> str:
    """The backend to run ``op`` with on tensors of ``device`` and ``dtype``.

    Args:
        op: The operator's name, for messages.
        requested: ``auto`` or one of ``supported``.
        supported: The backends that implement the operator.

    Raises:
        ValueError: If the requested backend is unknown, cannot handle the tensors or is not installed.
    """
    if requested == "torch":
        return "torch"
    if requested == "auto":
        return _automatic(op, device.type, supported, dtype == torch.float32)
    if requested not in supported:
        raise ValueError(f"{op}: unknown backend {requested!r}; choose one of auto, {', '.join(supported)}")
    problem = _tensor_problem(requested, device.type, dtype) or missing(requested)
    if problem:
        raise ValueError(f"{op}: backend {requested!r} cannot be used: {problem}")
    return requested


@cache
def missing(backend: str) -> str | None:
    """Why ``backend`` is not usable on this machine (with its install line), or None if it is."""
    if backend == "torch":
        return None
    if backend == "native":
        return native.unavailable_reason()
    if importlib.util.find_spec(backend) is None:
        return f"the package {backend} is not installed; {_INSTALL[backend]}"
    return None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (on CPU tensors too)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tensor_problem(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"it takes float32 tensors, not {dtype}; use backend 'torch'"
    if backend == "native":
        return None if device_type == "cpu" else f"it runs on the CPU and the tensors are on {device_type}"
    if device_type == "cuda" or (backend == "triton" and triton_interpreted()):
        return None
    return f"it needs CUDA tensors and these are on {device_type}"


@cache
def _automatic(op: str, device_type: str, supported: tuple[str, ...], is_float32: bool) -> str:
    if not is_float32:
        return "torch"
    reasons: list[str] = []
    for name in _AUTO.get(device_type, ("torch",)):
        problem = missing(name) if name in supported else None
        if name in supported and problem is None:
            note = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("%s on %s: backend %s%s", op, device_type, name, note)
            return name
        if problem:
            reasons.append(f"{name}: {problem}")
    return "torch"
