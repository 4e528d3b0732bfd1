"""Test helpers for exports: an exporter with small settings, samples of GLB files, and a failing format."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scoredist3d import registry
from scoredist3d.export.formats import base
from shared.export_fields import random_surface_points


def make_exporter(**options):
    entry = registry.lookup("exporter", "textured-mesh")
    defaults = {"resolution": 48, "texture_size": 256, "max_faces": 1200, "formats": ["glb"], "check": False}
    return entry.cls(entry.config_cls(**(defaults | options)))


def to_world(y_up):
    return np.asarray(y_up)[:, [2, 0, 1]]


def surface_samples(file, count=3000):
    """Points on the faces of a GLB in world axes, with texture coordinates (v upwards) and interpolated attributes."""
    attributes = file.attributes
    points, face, weights = random_surface_points(attributes["POSITION"], file.faces, count, np.random.default_rng(5))
    corners = {name: values[file.faces[face]] for name, values in attributes.items()}
    mixed = {name: np.einsum("nk,nkc->nc", weights, values) for name, values in corners.items()}
    uv = mixed["TEXCOORD_0"] * [1, -1] + [0, 1]
    return torch.from_numpy(to_world(points)).float(), uv, mixed, corners


def break_format(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Replace the writer of a format by one that raises an OSError."""

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setitem(base._formats, name, replace(base.lookup_format(name), write=fail))
