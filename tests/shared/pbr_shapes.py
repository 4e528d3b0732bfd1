"""Objects with all channels, and objects that are meshes themselves."""

import numpy as np
import torch

from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.mesh import Mesh
from shared.export_fields import AnalyticField, position_color, sphere


def roughness_at(points):
    return 0.5 + 0.4 * torch.sin(2 * points[:, 2])


def metallic_at(points):
    return 0.5 + 0.4 * torch.cos(3 * points[:, 0])


def bent_normal(points):
    """Unit normals of the sphere, tilted by up to 0.3 rad in a direction that varies."""
    normal = torch.nn.functional.normalize(points, dim=-1)
    tilt = 0.3 * torch.sin(4 * points[:, [1, 2, 0]])
    return torch.nn.functional.normalize(normal + tilt, dim=-1)


class PbrBall(AnalyticField):
    """A sphere of radius 0.6 with every channel that is asked for."""

    def __init__(self, *names):
        super().__init__(sphere(0.6), softness=0.01)
        self.names = names

    def channels(self, points, normals=None):
        known = {
            "roughness": roughness_at,
            "metallic": metallic_at,
            "normal": bent_normal,
            "occlusion": lambda p: 0.5 + 0.5 * p[:, 1].clamp(-1, 1),
        }
        return SurfaceChannels(position_color(points), **{name: known[name](points) for name in self.names})


class MeshShape:
    """A mesh that knows its colours."""

    radius, device, iso_level = 1.0, torch.device("cpu"), 1.0
    baked_lighting = False

    def __init__(self, mesh):
        self.mesh = mesh

    def density(self, points):
        raise AssertionError("the surface is known")

    def channels(self, points, normals=None):
        return SurfaceChannels(position_color(points))

    def surface(self):
        return self.mesh

    def splats(self):
        return None


def uv_sphere(rows=24, columns=48, radius=0.6):
    """A sphere with latitude and longitude as texture coordinates; closed, seams at the coordinates."""
    theta = np.pi * np.arange(1, rows) / rows
    phi = 2 * np.pi * np.arange(columns) / columns
    rings = np.stack(
        [
            np.outer(np.sin(theta), np.cos(phi)),
            np.outer(np.sin(theta), np.sin(phi)),
            np.repeat(np.cos(theta)[:, None], columns, 1),
        ],
        axis=-1,
    ).reshape(-1, 3)
    vertices = radius * np.concatenate([[[0, 0, 1]], rings, [[0, 0, -1]]])

    def vertex(i, j):
        return 0 if i == 0 else 1 + (rows - 1) * columns if i == rows else 1 + (i - 1) * columns + j % columns

    faces, uvs = [], []
    for i in range(rows):
        for j in range(columns):
            corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            for triple in ((0, 1, 2), (0, 2, 3)):
                chosen = [corners[k] for k in triple]
                face = [vertex(*corner) for corner in chosen]
                if len(set(face)) == 3:
                    faces.append(face)
                    uvs.append([(b / columns, 1 - a / rows) for a, b in chosen])
    unique, index = np.unique(np.array(uvs, np.float32).reshape(-1, 2), axis=0, return_inverse=True)
    return Mesh(vertices.astype(np.float32), np.array(faces, np.int64), unique, index.reshape(-1, 3).astype(np.int64))
