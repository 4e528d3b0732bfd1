"""Fuzzers of the loaders of files: small valid files after changes of bytes, sent to the loader of their format.

A loader either returns or raises its documented error, a ``ValueError`` (:class:`scoredist3d.config.fields.FieldError`
for the images of a config), with one short message.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from faults.fuzzing import FuzzInput, FuzzTarget, mutated
from PIL import Image

LONGEST_MESSAGE = 1000

Seeds = Callable[[], Mapping[str, bytes]]
"""Function that returns small valid files by name; a name is changed and loaded, all others lie next to it."""


def target(seeds: Seeds, load: Callable[[Path], object], companions: tuple[str, ...] = ()) -> FuzzTarget:
    """A target that changes one of the files of ``seeds``.

    Args:
        seeds: Valid files; a file and those that it refers to have the same stem.
        load: Function that loads a file.
        companions: Suffixes of files that are changed, too, but not loaded by themselves.
    """

    def make(rng: random.Random) -> FuzzInput:
        files = dict(seeds())
        main = rng.choice([name for name in sorted(files) if not name.endswith(companions or ("\0",))])
        group = {name: content for name, content in files.items() if Path(name).stem == Path(main).stem}
        changed = rng.choice(sorted(group)) if rng.random() < 0.4 else main
        group[changed] = mutated(rng, group[changed])
        return FuzzInput(group, (main,))

    def check(given: FuzzInput, folder: Path) -> str | None:
        given.write(folder)
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                load(folder / given.arguments[0])
        except ValueError as error:
            if isinstance(error, UnicodeError) or type(error).__module__.split(".")[0] not in (
                "builtins",
                "scoredist3d",
            ):
                return f"undocumented {type(error).__name__}: {str(error)[:300]}"
            return None if 0 < len(str(error)) <= LONGEST_MESSAGE else f"a message of {len(str(error))} characters"
        finally:
            logging.disable(logging.NOTSET)
            for name in given.files:
                (folder / name).unlink()
        return None

    return FuzzTarget(make, check)


@cache
def meshes() -> dict[str, bytes]:
    """A textured quad as OBJ with MTL and PNG, PLY, GLB and STL."""
    import trimesh

    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.5]], dtype=float)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    picture = Image.fromarray(_pixels(4, 4))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=picture, roughnessFactor=0.5)
    visual = trimesh.visual.TextureVisuals(uv=vertices[:, :2], material=material)
    textured = trimesh.Trimesh(vertices, faces, visual=visual, process=False)
    plain = trimesh.Trimesh(vertices, faces, vertex_colors=[[255, 0, 0, 255]] * 4, process=False)
    obj = "mtllib quad.mtl\nusemtl m\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in vertices)
    obj += "".join(f"vt {x} {y}\n" for x, y, _ in vertices) + "f 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"
    return {
        "quad.obj": obj.encode(),
        "quad.mtl": b"newmtl m\nKd 1 0.5 0.25\nPr 0.5\nPm 0\nmap_Kd quad.png\n",
        "quad.png": _encoded("PNG"),
        "binary.ply": _bytes(plain.export(file_type="ply")),
        "text.ply": _bytes(plain.export(file_type="ply", encoding="ascii")),
        "scene.glb": _bytes(textured.export(file_type="glb")),
        "binary.stl": _bytes(plain.export(file_type="stl")),
        "text.stl": _bytes(plain.export(file_type="stl_ascii")),
    }


@cache
def splats() -> dict[str, bytes]:
    """Three Gaussians as binary and as ASCII PLY."""
    names = ["x", "y", "z", *(f"f_dc_{i}" for i in range(3)), "opacity", *(f"scale_{i}" for i in range(3))]
    names += [f"rot_{i}" for i in range(4)]
    rows = np.random.default_rng(0).normal(size=(3, len(names))).astype("<f4")
    properties = "".join(f"property float {name}\n" for name in names)
    head = f"element vertex 3\n{properties}end_header\n"
    text = "\n".join(" ".join(f"{value:.4f}" for value in row) for row in rows) + "\n"
    return {
        "binary.ply": f"ply\nformat binary_little_endian 1.0\n{head}".encode() + rows.tobytes(),
        "text.ply": f"ply\nformat ascii 1.0\n{head}{text}".encode(),
    }


@cache
def images() -> dict[str, bytes]:
    """A small picture as PNG and JPEG, and a Radiance image, flat and run-length encoded."""
    flat = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 4 +X 4\n" + bytes(range(64, 128))
    run = bytes((2, 2, 0, 8)) + bytes((136, 90)) * 3 + bytes((136, 130))
    packed = b"#?RADIANCE\nEXPOSURE=2\nFORMAT=32-bit_rle_rgbe\n\n-Y 3 +X 8\n" + run * 3
    return {"a.png": _encoded("PNG"), "b.jpg": _encoded("JPEG"), "c.hdr": flat, "d.hdr": packed}


@cache
def checkpoints() -> dict[str, bytes]:
    """A checkpoint with a few tensors and plain values."""
    import tempfile

    import torch

    from scoredist3d.training.checkpoint import write_checkpoint

    content = {"state_dict": {"a": torch.zeros(4, 3), "b": torch.ones(2)}, "global_step": 5, "callbacks": {"x": [1.0]}}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(content, Path(folder) / "last.ckpt")
        return {"last.ckpt": (Path(folder) / "last.ckpt").read_bytes()}


@cache
def tables() -> dict[str, bytes]:
    """A metrics file, which a resumed run reads."""
    return {"metrics.csv": b'step,loss,"a ""b"", c"\n1,0.5,2\n2,0.25,\n3,1e-3,nan\n'}


def load_mesh(path: Path) -> object:
    """Load a mesh file with its materials."""
    from scoredist3d.meshes.loading import load_mesh as load

    return load(path)


def load_splats(path: Path) -> object:
    """Load Gaussians, and the same file as points."""
    from scoredist3d.meshes.splats import read_points, read_splats

    read_points(path)
    return read_splats(path)


def load_image(path: Path) -> object:
    """Load an environment image."""
    from scoredist3d.meshes.images import load_radiance

    return load_radiance(path, key="environment")


def load_checkpoint(path: Path) -> object:
    """Load a checkpoint, in memory and mapped from the disk."""
    from scoredist3d.training.checkpoint import checkpoint_step, read_checkpoint

    checkpoint_step(path)
    return read_checkpoint(path)


def load_table(path: Path) -> object:
    """Open a metrics file as a resumed run does."""
    from scoredist3d.training.metrics import MetricsFile

    return MetricsFile(path, resume_step=2)


def _pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def _encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_pixels(8, 16)).save(file, kind)
    return file.getvalue()


def _bytes(content: Any) -> bytes:
    return content.encode() if isinstance(content, str) else bytes(content)


TARGETS: dict[str, FuzzTarget] = {
    "meshes": target(meshes, load_mesh, companions=(".mtl", ".png")),
    "splats": target(splats, load_splats),
    "images": target(images, load_image),
    "checkpoints": target(checkpoints, load_checkpoint),
    "tables": target(tables, load_table),
}
