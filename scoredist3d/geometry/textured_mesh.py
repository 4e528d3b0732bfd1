"""Triangle mesh from a file or another representation, with a trainable texture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scoredist3d.config import FieldError, option
from scoredist3d.geometry.base import GeometryInit, PointFunction, Surface, SurfaceMesh, SurfacePoints
from scoredist3d.geometry.mesh_queries import closest_on, density_of
from scoredist3d.geometry.texture_field import PointField
from scoredist3d.limits import MAX_FACES, MAX_FEATURES
from scoredist3d.materials.base import Material
from scoredist3d.meshes.loading import LoadedMesh, load_mesh
from scoredist3d.meshes.mesh import Mesh, decimate
from scoredist3d.meshes.sampling import points_near
from scoredist3d.meshes.texels import fill_uncovered, rasterize, texel_points
from scoredist3d.meshes.uv import unusable_uvs, unwrap
from scoredist3d.nn.hash_network import FREE_OPTIONS, HashGridConfig, NetworkConfig, grid_problems
from scoredist3d.ops.gather import blend_rows
from scoredist3d.ops.rasterization.rasterize import sample_texture
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

logger = logging.getLogger(__name__)

# Buffers whose number of rows depends on the mesh, and their number of columns.
_COLUMNS = {"vertices": 3, "faces": 3, "uvs": 2, "uv_faces": 3}
_CHUNK = 131072
DEFAULT_FACES = 20000


@register("geometry", "textured-mesh", summary="Mesh from a file or an earlier stage, with a trainable texture.")
class TexturedMesh(Surface):
    """A mesh with fixed faces, optionally deformable vertices, and features in an image or in a field.

    With ``deformable``, vertex i is at x_i + max_offset * radius * tanh(d_i) with a parameter d_i that is initially
    zero. An image of features is sampled bilinearly at the mesh's texture coordinates: those of the file if they are
    usable, otherwise new ones. The features are initialized with the colors of the file or of the earlier stage.

    The mesh of a file keeps all its faces unless ``max_faces`` is set. The mesh of an earlier stage is simplified to
    20,000 faces if it needs new texture coordinates.

    Attributes:
        vertices: (V, 3), undeformed vertices, world.
        faces: (F, 3) int64.
        uvs: (T, 2), texture coordinates; T = 0 if the mesh has none.
        uv_faces: (F, 3) int64, indices into ``uvs``.
        authored: (), bool, whether the mesh comes from a user's file.
    """

    # These options affect only the initial mesh, which is part of the state, and the choice of trained parameters.
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
            None, "Number of feature channels; null uses the number that the material requires.", ge=1, le=MAX_FEATURES
        )
        mesh: str | None = option(
            None, "Mesh file (.glb, .obj, .ply, .stl); not needed if the run starts from another run.", file=True
        )
        up: Literal["auto", "y", "z"] = option(
            "auto", "Upward axis of the file; auto uses y for GLB and OBJ, and z for PLY and STL."
        )
        fit: bool = option(True, "Center the mesh of the file and scale it to fit_size.")
        fit_size: float = option(
            0.9, "Largest distance of the scaled mesh from the origin, as a fraction of the radius.", gt=0, le=1
        )
        texture: Literal["image", "field"] = option(
            "image", "Source of the features: texels of an image, or a hash grid with a network."
        )
        texture_size: int = option(1024, "Width and height of the image in texels.", ge=8, le=8192)
        max_faces: int | None = option(
            None,
            "Simplify the mesh to this many faces and create new texture coordinates. By default, a file's mesh keeps "
            f"all its faces, and an earlier stage's is simplified to {DEFAULT_FACES} if it needs new coordinates.",
            ge=16,
            le=MAX_FACES,
        )
        padding: int = option(4, "Texels between the charts of the texture.", ge=0, le=64)
        unwrap_timeout: float = option(
            60.0, "Time limit for xatlas in seconds; if exceeded, each face gets its own chart.", ge=0
        )
        grid: HashGridConfig = field(default_factory=HashGridConfig, metadata={"help": "Hash grid for texture: field."})
        network: NetworkConfig = field(default_factory=NetworkConfig, metadata={"help": "Network after the hash grid."})
        deformable: bool = option(False, "Also train the positions of the vertices.")
        max_offset: float = option(
            0.1, "Maximum displacement of a vertex along each axis, as a fraction of the radius.", gt=0
        )
        fix_texture: bool = option(False, "Freeze the features and train only the vertices.")

        def validate(self) -> list[str]:
            """Check relations between the options."""
            problems = super().validate() + grid_problems(self.grid)
            if self.fix_texture and not self.deformable:
                problems.append(
                    "fix_texture: without deformable, no parameters are left to train; set deformable=true, or "
                    "fix_texture=false"
                )
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
            self._load_file(config.mesh, material, rng)

    def forward(self) -> SurfaceMesh:
        """The mesh with the current offsets.

        Raises:
            ValueError: No mesh has been given.
        """
        if not len(self.faces):
            raise ValueError(
                "geometry.mesh: textured-mesh needs a mesh; set a file (.glb, .obj, .ply, .stl), or a run to start "
                "from (system.init_from)"
            )
        moved = self.vertices
        if self.offsets is not None:
            moved = moved + self.config.max_offset * self.radius * self.offsets.tanh()
        uvs, uv_faces = (self.uvs, self.uv_faces) if len(self.uvs) else (None, None)
        return SurfaceMesh(moved, self.faces, uvs, uv_faces, fixed_topology=True, rest=self.vertices)

    def features(self, points: SurfacePoints) -> Tensor:
        """(N, F) features, from the image at the texture coordinates or from the field at the points.

        Raises:
            ValueError: The features are in an image, but the points have no texture coordinates.
        """
        if self.field is not None:
            features: Tensor = self.field(points.points)
            return features
        assert self.image is not None
        if points.uv is None:
            raise ValueError(
                "textured-mesh: texture=image needs points with texture coordinates; pass them as uv, or set "
                "geometry.texture=field"
            )
        return sample_texture(self.image, points.uv, wrap="clamp")

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) features of the field at (N, 3) world points, or of the image at the closest points of the mesh."""
        if self.field is not None:
            return self.features(SurfacePoints(points))
        found = closest_on(self.forward(), points)
        uv = blend_rows(self.uvs, self.uv_faces[found.faces], found.barycentric)
        return self.features(SurfacePoints(found.points, uv))

    def density(self, points: Tensor) -> Tensor:
        """(N,) exp(-sdf / (0.01 radius)) at (N, 3) world points, with the signed distance to the mesh."""
        return density_of(self.surface(), points, self.radius)

    def surface(self) -> Mesh:
        """The mesh with its texture coordinates, as NumPy arrays."""
        return replace(self.forward().to_mesh(), authored=bool(self.authored))

    def init_from(self, source: GeometryInit, rng: Rng) -> str:
        """Copy the source's mesh, with its texture coordinates if they are usable, and fit the features.

        Raises:
            ValueError: The source has no faces.
        """
        if not len(source.mesh.faces):
            raise FieldError("the source mesh has no faces; check the earlier stage or the file")
        summary, _ = self._set_mesh(source.mesh)
        return summary if source.features is None else f"{summary}; {self._set_features(source.features, rng)}"

    def prepare_loading(self, state: Mapping[str, Tensor]) -> None:
        """Resize the tensors of the mesh to the sizes in ``state``.

        Raises:
            ValueError: A face in ``state`` refers to a vertex that does not exist; kernels do not check that.
        """
        for faces, points in (("faces", "vertices"), ("uv_faces", "uvs")):
            if faces in state and points in state and _is_out_of_range(state[faces], len(state[points])):
                raise ValueError(
                    f"the checkpoint is damaged: its {faces} refer to {points} that do not exist; use another one"
                )
        # States of earlier versions have no ``authored``; the current value is then kept.
        self.register_buffer("authored", self.authored, persistent="authored" in state or "vertices" not in state)
        for name, columns in _COLUMNS.items():
            found = state.get(name)
            if found is not None and found.ndim == 2 and found.shape[1] == columns:
                self._resize(name, len(found))

    def update_step(self, step: int) -> None:
        """Activate the levels of the field's hash grid that are due at ``step``."""
        if self.field is not None:
            self.field.update_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups ``offsets`` (if deformable), and ``texture`` or the field's ``encoding`` and ``network``."""
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
        """Parameters of the image or of the field."""
        return [self.image] if self.image is not None else list(self.field.parameters()) if self.field else []

    def _load_file(self, path: str, material: Material | None, rng: Rng) -> None:
        """Load the mesh of a file and, if the material can represent them, its colors.

        Raises:
            ValueError: The file cannot be read, or its mesh extends outside the ball.
        """
        loaded = load_mesh(path, self.config.up)
        if self.config.fit:
            loaded = loaded.fitted(self.radius, self.config.fit_size)
        reach = float(np.linalg.norm(loaded.mesh.vertices, axis=1).max())
        if reach > self.radius * (1 + 1e-5):
            raise FieldError(
                f"{path} reaches {reach:.3g} from the origin, outside the ball of geometry.radius = "
                f"{self.radius:g}; set geometry.fit=true or a larger geometry.radius",
                "mesh",
            )
        summary, level = self._set_mesh(loaded.mesh, loaded.uv_changes)
        logger.log(level, "geometry.mesh: %s: %s", Path(path).name, summary)
        if loaded.has_colors and material is not None:
            self._set_file_colors(loaded, material, rng)

    def _set_file_colors(self, loaded: LoadedMesh, material: Material, rng: Rng) -> None:
        """Initialize the features with the colors of a file, if the material can represent them."""
        try:
            summary = self._set_features(lambda points: material.features_of(loaded.appearance(points)), rng)
        except ValueError as error:
            # Not every material can be inverted; the mesh is useful without its colors.
            logger.warning("geometry.mesh: the colors of the file are not used: %s", error)
        else:
            logger.info("geometry.mesh: %s", summary)

    def _set_mesh(self, mesh: Mesh, uv_changes: str = "") -> tuple[str, int]:
        """Replace the mesh, simplified and unwrapped if necessary, and set the offsets to zero.

        Args:
            mesh: World coordinates.
            uv_changes: See :class:`~scoredist3d.meshes.loading.LoadedMesh`.

        Returns:
            A description of its faces and texture coordinates for the log, and the logging level: a warning if faces or
            texture coordinates of a user's file were replaced.
        """
        given, self.authored = mesh, torch.full_like(self.authored, mesh.authored)
        problem = "" if given.uvs is None else unusable_uvs(given)
        budget = self._budget(given, usable=given.uvs is not None and not problem)
        if len(given.faces) > budget:
            mesh = decimate(replace(given, uvs=None, uv_faces=None), budget)
            problem = problem or "they belong to the faces before simplification"
        mesh, summary = self._with_uvs(mesh, given, problem, uv_changes)
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
        return f"{faces}; {summary}", logging.WARNING if mesh.authored and lost else logging.INFO

    def _budget(self, mesh: Mesh, *, usable: bool) -> int:
        """Maximum number of faces for ``mesh``, given whether its texture coordinates are ``usable``."""
        if self.config.max_faces is not None:
            return self.config.max_faces
        unwrapped = self.config.texture == "image" and not usable
        return DEFAULT_FACES if unwrapped and not mesh.authored else len(mesh.faces)

    def _with_uvs(self, mesh: Mesh, given: Mesh, problem: str, uv_changes: str) -> tuple[Mesh, str]:
        """The mesh with its own texture coordinates if they are usable, otherwise with new ones or none.

        New texture coordinates are made if the features are in an image; with a field, the mesh has none.

        Args:
            mesh: The mesh after simplification.
            given: The mesh before simplification.
            problem: Reason why the texture coordinates of ``given`` cannot be used, or an empty string.
            uv_changes: Changes to the texture coordinates of the file when it was loaded, or an empty string.

        Returns:
            The mesh, and a description of its texture coordinates for the log.
        """
        if given.uvs is not None and not problem:
            return mesh, f"its own texture coordinates are used{f', which {uv_changes}' if uv_changes else ''}"
        reason = "it has no texture coordinates"
        if given.uvs is not None:
            reason = f"its own texture coordinates are not used: {problem}"
        elif uv_changes:
            reason = f"its own texture coordinates {uv_changes}"
        mesh = replace(mesh, uvs=None, uv_faces=None, vertex_colors=None)
        config = self.config
        if config.texture == "field":
            return mesh, f"{reason}; the export makes new ones"
        try:
            unwrapped, note = unwrap(mesh, config.texture_size, padding=config.padding, timeout=config.unwrap_timeout)
        except ValueError as error:
            raise FieldError(
                f"{config.texture_size} is too small for a separate chart for each of "
                f"{len(mesh.faces)} faces; raise it or geometry.unwrap_timeout, or set geometry.max_faces to simplify "
                "the mesh",
                "texture_size",
            ) from error
        return unwrapped, f"{reason}; new ones were made{f': {note}' if note else ''}"

    def _set_features(self, features: PointFunction, rng: Rng) -> str:
        """Set the texels to ``features``, or fit the field to it; returns a description of the result for the log."""
        mesh = self.forward().to_mesh()
        if self.field is not None:
            error = self.field.fit(features, points_near(mesh, 0.005 * self.radius, self.vertices), rng)
            return f"features fitted with an RMS error of {error:.2g}"
        assert self.image is not None
        size = self.config.texture_size
        texels = rasterize(mesh, size)
        points = torch.from_numpy(texel_points(mesh, texels).astype(np.float32)).to(self.vertices)
        with torch.no_grad():
            values = torch.cat([features(part) for part in points.split(_CHUNK)]).cpu().numpy()
            image = np.zeros((size * size, self.num_features), dtype=np.float32)
            image[texels.index] = values
            filled = fill_uncovered(image.reshape(size, size, -1), texels.index)
            self.image.copy_(torch.from_numpy(filled))
        return f"features in an image of {size} x {size} texels, {len(texels.index) / size**2:.0%} of them in use"

    def _resize(self, name: str, length: int) -> None:
        """Resize a buffer to ``length`` rows with unspecified values, and the offsets together with the vertices."""
        buffer = getattr(self, name)
        if len(buffer) != length:
            setattr(self, name, buffer.new_zeros(length, buffer.shape[1]))
        if name == "vertices" and self.offsets is not None and len(self.offsets) != length:
            self.offsets.data = self.offsets.data.new_zeros(length, 3)
            self.offsets.grad = None


def _is_out_of_range(indices: Tensor, count: int) -> bool:
    return not bool(((indices >= 0) & (indices < count)).all())
