"""A triangle mesh from a file or another representation, with a texture to train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scoredist3d.config import FieldError, option
from scoredist3d.geometry.base import GeometryInit, Surface, SurfaceMesh, SurfacePoints
from scoredist3d.geometry.mesh_queries import closest_on, density_of, to_mesh
from scoredist3d.geometry.texture_field import PointField
from scoredist3d.materials.base import Material
from scoredist3d.meshes.loading import LoadedMesh, load_mesh
from scoredist3d.meshes.mesh import Mesh, decimate
from scoredist3d.meshes.texels import fill_uncovered, rasterize, texel_points
from scoredist3d.meshes.uv import unusable_uvs, unwrap
from scoredist3d.nn.hash_network import FREE_OPTIONS, HashGridConfig, NetworkConfig, grid_problems
from scoredist3d.nn.regression import points_near
from scoredist3d.ops.gather import blend_rows
from scoredist3d.ops.rasterization.rasterize import sample_texture
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

logger = logging.getLogger(__name__)

Look = Callable[[Tensor], Tensor]
# Buffers whose lengths the mesh decides, and their columns.
_COLUMNS = {"vertices": 3, "faces": 3, "uvs": 2, "uv_faces": 3}
_CHUNK = 131072
DEFAULT_FACES = 20000


@register("geometry", "textured-mesh", summary="A mesh from a file or an earlier stage with a texture to train.")
class TexturedMesh(Surface):
    """Faces that stay, vertices that may move a little, and features in an image or in a field around the surface.

    With ``deformable`` vertex i is at x_i + max_offset * radius * tanh(d_i), d_i parameters that start at zero. An
    image of features is sampled bilinearly at the mesh's texture coordinates: the file's own where it has usable ones,
    else those of an unwrapping. It starts with the colours of the file or of the earlier stage, if there are any.

    A file's mesh keeps all its faces unless ``max_faces`` is set; one of an earlier stage that has to be unwrapped is
    simplified to 20,000 faces first.

    Attributes:
        authored: (), whether the mesh comes from a user's file; part of the state.
    """

    # The mesh is in the state.
    free_options = FREE_OPTIONS | {
        "mesh",
        "up",
        "fit",
        "fit_size",
        "max_faces",
        "padding",
        "unwrap_timeout",
        "fix_texture",
    }

    @dataclass
    class Config(Surface.Config):
        """Options of the textured mesh."""

        num_features: int | None = option(
            None, "Feature channels handed to the material; as many as it takes where not given.", ge=1
        )
        mesh: str | None = option(
            None, "Mesh file (.glb, .obj, .ply, .stl); not needed where the run starts from another one.", file=True
        )
        up: Literal["auto", "y", "z"] = option(
            "auto", "The file's upward axis; auto is what its format says: y for GLB and OBJ, z for PLY and STL."
        )
        fit: bool = option(True, "Centre the file's mesh and scale it to reach fit_size of the radius.")
        fit_size: float = option(
            0.9, "How far the mesh then reaches from the origin; fraction of the radius.", gt=0, le=1
        )
        texture: Literal["image", "field"] = option(
            "image", "Features in the texels of an image, or in a hash grid around the surface."
        )
        texture_size: int = option(1024, "Side of the image in texels.", ge=8, le=8192)
        max_faces: int | None = option(
            None,
            "Simplify the mesh to this many faces, with new texture coordinates. By default a file's mesh keeps all "
            f"its faces, and one of an earlier stage is simplified to {DEFAULT_FACES} where it has to be unwrapped.",
            ge=16,
        )
        padding: int = option(4, "Texels between the pieces of the texture.", ge=0, le=64)
        unwrap_timeout: float = option(60.0, "Seconds for xatlas; then each face gets its own piece of texture.", ge=0)
        grid: HashGridConfig = field(
            default_factory=HashGridConfig, metadata={"help": "The encoding of texture: field."}
        )
        network: NetworkConfig = field(default_factory=NetworkConfig, metadata={"help": "The network after it."})
        deformable: bool = option(False, "Train the positions of the vertices too.")
        max_offset: float = option(0.1, "Furthest that a vertex may move along an axis, fraction of the radius.", gt=0)
        fix_texture: bool = option(False, "Keep the features as they are and train the vertices alone.")

        def validate(self) -> list[str]:
            """Relations between the options."""
            problems = super().validate() + grid_problems(self.grid)
            if self.fix_texture and not self.deformable:
                problems.append("fix_texture: without deformable nothing is left to train; set one of the two")
            return problems

    iso_level = 1.0
    vertices: Tensor
    faces: Tensor
    uvs: Tensor
    uv_faces: Tensor
    authored: Tensor

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = config.num_features or (3 if material is None else material.num_features)
        for name, columns in _COLUMNS.items():
            dtype = torch.int64 if name.endswith("faces") else torch.float32
            self.register_buffer(name, torch.zeros(0, columns, dtype=dtype))
        self.register_buffer("authored", torch.zeros((), dtype=torch.bool))
        rng = (rng or Rng()).shared()
        self.image: nn.Parameter | None = None
        self.field: PointField | None = None
        if config.texture == "image":
            self.image = nn.Parameter(torch.zeros(config.texture_size, config.texture_size, self.num_features))
        else:
            self.field = PointField(
                config.grid,
                config.network,
                num_outputs=self.num_features,
                radius=self.radius,
                generator=rng("geometry"),
            )
        self.offsets = nn.Parameter(torch.zeros(0, 3)) if config.deformable else None
        for parameter in self._texture_parameters():
            parameter.requires_grad_(not config.fix_texture)
        if config.mesh is not None:
            self._take_file(config.mesh, material, rng)

    def forward(self) -> SurfaceMesh:
        """The mesh with the current offsets.

        Raises:
            ValueError: There is no mesh yet.
        """
        if not len(self.faces):
            raise ValueError(
                "geometry.mesh: textured-mesh has no mesh; name a file (.glb, .obj, .ply), or a run to start from "
                "(system.init_from)"
            )
        moved = self.vertices
        if self.offsets is not None:
            moved = moved + self.config.max_offset * self.radius * self.offsets.tanh()
        uvs, uv_faces = (self.uvs, self.uv_faces) if len(self.uvs) else (None, None)
        return SurfaceMesh(moved, self.faces, uvs, uv_faces, fixed_topology=True, rest=self.vertices)

    def features(self, points: SurfacePoints) -> Tensor:
        """(N, F): the image at the points' texture coordinates, or the field at the points.

        Raises:
            ValueError: An image is to be sampled at points without texture coordinates.
        """
        if self.field is not None:
            features: Tensor = self.field(points.points)
            return features
        assert self.image is not None
        if points.uv is None:
            raise ValueError("textured-mesh: an image texture needs points with texture coordinates")
        return sample_texture(self.image, points.uv, wrap="clamp")

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) at the closest points of the mesh to (N, 3) world points."""
        if self.field is not None:
            return self.features(SurfacePoints(points))
        found = closest_on(self.forward(), points)
        uv = blend_rows(self.uvs, self.uv_faces[found.faces], found.barycentric)
        return self.features(SurfacePoints(found.points, uv))

    def density(self, points: Tensor) -> Tensor:
        """(N,) exp(-sdf / (0.01 radius)) with the signed distance of the mesh."""
        return density_of(self.surface(), points, self.radius)

    def surface(self) -> Mesh:
        """The mesh with its texture coordinates."""
        return replace(to_mesh(self.forward()), authored=bool(self.authored))

    def init_from(self, start: GeometryInit, rng: Rng) -> str:
        """The start's mesh, with its texture coordinates if it has any, and its look.

        Raises:
            ValueError: The start has no faces.
        """
        if not len(start.mesh.faces):
            raise FieldError("textured-mesh cannot start from a mesh without faces")
        said, _ = self._take(start.mesh)
        return said if start.features is None else f"{said}; {self._take_look(start.features, rng)}"

    def prepare_loading(self, state: Mapping[str, Tensor]) -> None:
        """Take over the lengths of the mesh's tensors."""
        # States of earlier versions have no ``authored``; the value of the config then stays.
        self.register_buffer("authored", self.authored, persistent="authored" in state or "vertices" not in state)
        for name, columns in _COLUMNS.items():
            found = state.get(name)
            if found is not None and found.ndim == 2 and found.shape[1] == columns:
                self._resize(name, len(found))

    def update_step(self, step: int) -> None:
        """Coarse to fine in the field."""
        if self.field is not None:
            self.field.update_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``offsets``, and ``texture`` or the field's ``encoding`` and ``network``."""
        groups: list[dict[str, Any]] = []
        if self.offsets is not None:
            groups.append({"name": "offsets", "params": [self.offsets]})
        if self.field is not None:
            groups.append({"name": "encoding", "params": [self.field.table]})
            groups.append({"name": "network", "params": list(self.field.network.parameters())})
        else:
            groups.append({"name": "texture", "params": [self.image]})
        return groups

    def _texture_parameters(self) -> list[nn.Parameter]:
        return [self.image] if self.image is not None else list(self.field.parameters()) if self.field else []

    def _take_file(self, path: str, material: Material | None, rng: Rng) -> None:
        loaded = load_mesh(path, self.config.up)
        if self.config.fit:
            loaded = loaded.fitted(self.radius, self.config.fit_size)
        reach = float(np.linalg.norm(loaded.mesh.vertices, axis=1).max())
        if reach > self.radius * (1 + 1e-5):
            raise FieldError(
                f"{path} reaches {reach:.3g} from the origin, out of the ball of geometry.radius = "
                f"{self.radius:g}; set geometry.fit=true or a larger radius",
                "mesh",
            )
        said, level = self._take(loaded.mesh, loaded.uv_changes)
        logger.log(level, "geometry.mesh: %s: %s", Path(path).name, said)
        if loaded.has_colors and material is not None:
            self._take_file_look(loaded, material, rng)

    def _take_file_look(self, loaded: LoadedMesh, material: Material, rng: Rng) -> None:
        try:
            look = self._take_look(lambda points: material.features_of(loaded.look(points)), rng)
        except ValueError as error:
            # Materials whose colours depend on more than a point's features have no inverse; the shape is still of use.
            logger.warning("geometry.mesh: the file's colours are left out: %s", error)
        else:
            logger.info("geometry.mesh: %s", look)

    def _take(self, mesh: Mesh, uv_changes: str = "") -> tuple[str, int]:
        """Make this the mesh, at rest.

        Args:
            mesh: World coordinates.
            uv_changes: See :class:`~scoredist3d.meshes.loading.LoadedMesh`.

        Returns:
            A sentence on its faces and texture coordinates, and its logging level: a warning where something of the
            mesh was given up.
        """
        given, self.authored = mesh, torch.full_like(self.authored, mesh.authored)
        problem = "" if given.uvs is None else unusable_uvs(given)
        budget = self._budget(given, usable=given.uvs is not None and not problem)
        if len(given.faces) > budget:
            mesh = decimate(replace(given, uvs=None, uv_faces=None), budget)
            problem = problem or "they belong to the faces before simplification"
        mesh, said = self._with_uvs(mesh, given, problem, uv_changes)
        for name in _COLUMNS:
            values = getattr(mesh, name)
            if values is None:
                values = np.zeros((0, _COLUMNS[name]))
            self._resize(name, len(values))
            buffer = getattr(self, name)
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(values)).to(buffer.dtype))
        if self.offsets is not None:
            with torch.no_grad():
                self.offsets.zero_()
        faces = f"{len(mesh.faces):,} faces"
        if len(given.faces) > budget:
            faces += f", simplified from {len(given.faces):,} because geometry.max_faces is {budget:,}"
        lost = bool(problem) or len(given.faces) > budget or (given.uvs is None and bool(uv_changes))
        return f"{faces}; {said}", logging.WARNING if mesh.authored and lost else logging.INFO

    def _budget(self, mesh: Mesh, *, usable: bool) -> int:
        """The most faces that ``mesh`` may have; ``usable`` says whether its texture coordinates can be used."""
        if self.config.max_faces is not None:
            return self.config.max_faces
        unwrapped = self.config.texture == "image" and not usable
        return DEFAULT_FACES if unwrapped and not mesh.authored else len(mesh.faces)

    def _with_uvs(self, mesh: Mesh, given: Mesh, problem: str, uv_changes: str) -> tuple[Mesh, str]:
        """The mesh with the texture coordinates that were given or, where an image needs them, with new ones.

        Args:
            mesh: Within the budget.
            given: The mesh before that.
            problem: Why the coordinates of ``given`` cannot be used, or an empty string.
            uv_changes: How they differ from the file's.

        Returns:
            The mesh, and a sentence on the coordinates.
        """
        if given.uvs is not None and not problem:
            return mesh, f"its own texture coordinates are used{f', which {uv_changes}' if uv_changes else ''}"
        said = "it has no texture coordinates"
        if given.uvs is not None:
            said = f"its own texture coordinates are not used: {problem}"
        elif uv_changes:
            said = f"its own texture coordinates {uv_changes}"
        mesh = replace(mesh, uvs=None, uv_faces=None, vertex_colors=None)
        config = self.config
        if config.texture == "field":
            return mesh, f"{said}; the export makes new ones"
        try:
            unwrapped, note = unwrap(mesh, config.texture_size, padding=config.padding, timeout=config.unwrap_timeout)
        except ValueError as error:
            raise FieldError(
                f"{config.texture_size} is too small to give each of {len(mesh.faces)} faces "
                "its own piece of texture; raise it or geometry.unwrap_timeout, or set geometry.max_faces to simplify "
                "the mesh",
                "texture_size",
            ) from error
        return unwrapped, f"{said}; new ones were made{f': {note}' if note else ''}"

    def _take_look(self, look: Look, rng: Rng) -> str:
        """Make the features those of ``look``; a sentence on how well that went."""
        mesh = to_mesh(self.forward())
        if self.field is not None:
            error = self.field.fit(look, points_near(mesh, 0.005 * self.radius, self.vertices), rng)
            return f"features fitted, {error:.2g} off on average"
        assert self.image is not None
        size = self.config.texture_size
        texels = rasterize(mesh, size)
        points = torch.from_numpy(texel_points(mesh, texels).astype(np.float32)).to(self.vertices)
        with torch.no_grad():
            values = torch.cat([look(part) for part in points.split(_CHUNK)]).cpu().numpy()
            image = np.zeros((size * size, self.num_features), dtype=np.float32)
            image[texels.index] = values
            filled = fill_uncovered(image.reshape(size, size, -1), texels.index)
            self.image.copy_(torch.from_numpy(filled))
        return f"features in an image of {size} x {size} texels, {len(texels.index) / size**2:.0%} of them in use"

    def _resize(self, name: str, length: int) -> None:
        """Give a buffer, and with the vertices their offsets, a new length; the values are then to be set."""
        buffer = getattr(self, name)
        if len(buffer) != length:
            setattr(self, name, buffer.new_zeros(length, buffer.shape[1]))
        if name == "vertices" and self.offsets is not None and len(self.offsets) != length:
            self.offsets.data = self.offsets.data.new_zeros(length, 3)
            self.offsets.grad = None
