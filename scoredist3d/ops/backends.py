"""Selection of the backend that runs an operator.

``auto`` selects the first usable backend for the device: Triton and then torch on CUDA, native C and then torch on the
CPU. The choice is logged once per operator and device. Requesting a backend that is not usable raises an error that
says what to install.
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
    "triton": "pip install triton (Linux only; included in CUDA builds of torch)",
    "nerfacc": "pip install nerfacc",
    "tinycudann": "see requirements-cuda.txt",
    "nvdiffrast": "see requirements-cuda.txt",
    "gsplat": "pip install gsplat (its kernels are compiled at first use and need nvcc)",
}
_AUTO = {"cuda": ("triton", "torch"), "cpu": ("native", "torch")}


def choose(op: str, requested: str, device: torch.device, supported: tuple[str, ...], dtype: torch.dtype) -> str:
    """Backend that runs ``op`` on tensors with the given ``device`` and ``dtype``.

    Args:
        op: Name of the operator, used in messages.
        requested: ``auto`` or one of ``supported``.
        device: Device of the tensors.
        supported: Backends that implement the operator.
        dtype: Dtype of the tensors.

    Raises:
        ValueError: The requested backend is unknown, does not support the tensors, or is not installed.
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
    """Reason why ``backend`` is not usable on this machine, with its install command; None if it is usable."""
    if backend == "torch":
        return None
    if backend == "native":
        return native.unavailable_reason()
    if importlib.util.find_spec(backend) is None:
        return f"the package {backend} is not installed; {_INSTALL[backend]}"
    return None


def triton_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which also accepts CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tensor_problem(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Reason why a backend does not support tensors of this device and dtype, or None."""
    if dtype != torch.float32:
        return f"it supports only float32 tensors, not {dtype}; use backend 'torch'"
    if backend == "native":
        return None if device_type == "cpu" else f"it needs CPU tensors, but these are on {device_type}"
    if device_type == "cuda" or (backend == "triton" and triton_interpreted()):
        return None
    return f"it needs CUDA tensors, but these are on {device_type}"


@cache
def _automatic(op: str, device_type: str, supported: tuple[str, ...], is_float32: bool) -> str:
    """Backend that ``auto`` selects; logs the choice, and why faster backends are not usable."""
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
