"""C kernels for the CPU, compiled at first use and called through ctypes.

The kernels are plain C with OpenMP and raw pointers, so that any C compiler builds them in about two seconds and
without headers other than those of the C library; a torch extension would take a minute. The shared library is stored
in the user's cache folder under a hash of everything that it depends on. Without a compiler, the operators use torch.
``SCOREDIST3D_NATIVE=0`` disables the kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from scoredist3d.ops import cache
from scoredist3d.reasons import os_reason

logger = logging.getLogger("scoredist3d")

_SOURCES = tuple(sorted(path.name for path in Path(__file__).parent.glob("*.c")))
# No contraction into FMA: the kernels are then bit-identical to the torch reference where the order of operations
# agrees.
_BASE_FLAGS = (
    "-std=gnu11",
    "-O2",
    "-ftree-vectorize",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
# Fastest first; if the compiler or the machine does not support an entry, the next one is tried.
_OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
_COMPILE_TIMEOUT = 120.0


class _Unavailable(Exception):
    """Error raised if the library cannot be built or loaded; the message gives the reason."""


def available() -> bool:
    """Whether the C kernels are usable; builds them if necessary."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """One-line reason why the kernels are not usable, or None if they are."""
    return _load()[1]


def call(function: str, *arguments: Tensor | float | int | None) -> None:
    """Call a kernel, with torch's number of threads as an additional last argument.

    Tensors must be contiguous and are passed as pointers, None as a null pointer, ``int`` as int64 and ``float`` as a C
    float.

    Raises:
        RuntimeError: The kernels are not usable.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the C kernels are not available: {reason}; use backend 'torch' instead")
    kernel = getattr(library, function)
    kernel.restype = None
    kernel(*(_as_ctypes(argument) for argument in arguments), ctypes.c_int64(torch.get_num_threads()))


def _as_ctypes(argument: Tensor | float | int | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous() and argument.device.type == "cpu"
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reason why the library is not usable."""
    if os.environ.get("SCOREDIST3D_NATIVE") == "0":
        return None, "disabled by SCOREDIST3D_NATIVE=0"
    try:
        return _build(), None
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        return None, " ".join(str(error).split())[:300]


def _build() -> ctypes.CDLL:
    """Load the library from the cache, or compile it with the first compiler and flags that work."""
    compilers = _compilers()
    if not compilers:
        raise _Unavailable("no C compiler found; install one (for example `apt install gcc`) or set $CC")
    problem = ""
    for compiler in compilers:
        for optional in _OPTIONAL_FLAGS:
            command = [*compiler, *_BASE_FLAGS, *optional]
            stem = f"native-{_key(command)}"
            try:
                return ctypes.CDLL(str(cache.find(stem, ".so") or cache.store(stem, ".so", partial(_compile, command))))
            except (_Unavailable, OSError, subprocess.SubprocessError) as error:
                problem = f"{shlex.join(command)}: {error}"
                if isinstance(error, OSError) and error.errno is not None:  # The cache folder cannot be written.
                    problem = f"{os_reason(error)} ($XDG_CACHE_HOME chooses the cache folder)"
                logger.debug("native kernels: %s", problem)
    raise _Unavailable(problem)


def _compilers() -> list[list[str]]:
    """Commands of the installed C compilers, ``$CC`` first."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    commands = [shlex.split(name) for name in dict.fromkeys(names) if name.strip()]
    return [[path, *command[1:]] for command in commands if (path := shutil.which(command[0])) is not None]


def _key(command: list[str]) -> str:
    """Hash of everything that the library depends on: command, processor and sources."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update("\0".join([*command, _processor()]).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _processor() -> str:
    """Description of the processor (architecture, model, instruction sets), on which ``-march=native`` depends."""
    description = [platform.system(), platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        description += sorted(
            {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        )
    return "\n".join(description)


def _compile(command: list[str], target: Path) -> None:
    """Compile the sources to the shared library ``target``."""
    sources = [str(Path(__file__).parent / source) for source in _SOURCES]
    full = [*command, *sources, "-o", str(target), "-lm"]
    done = subprocess.run(full, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT, check=False)
    if done.returncode != 0:
        raise _Unavailable(done.stderr.strip()[:300] or f"exit status {done.returncode}")
