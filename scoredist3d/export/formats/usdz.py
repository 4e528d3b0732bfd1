"""USDZ: one textured mesh for AR viewers; needs the optional package usd-core."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scoredist3d.export.formats.base import register_format
from scoredist3d.export.frame import Frame
from scoredist3d.export.products import TexturedProduct
from scoredist3d.meshes.mesh import Mesh

INSTALL = "pip install usd-core"


def usdz_problem() -> str:
    """Reason why USDZ files cannot be written, or an empty string."""
    if importlib.util.find_spec("pxr") is not None:
        return ""
    return f"exporter.formats: usdz needs the package usd-core, which is not installed: {INSTALL}"


@register_format(
    "usdz",
    suffix=".usdz",
    needs=TexturedProduct,
    summary="USDZ with the baked textures for AR viewers, y up, in meters; needs the package usd-core.",
    problem=usdz_problem,
)
def write_usdz(path: Path, product: TexturedProduct) -> list[Path]:
    """Write a USDZ file with one mesh and one ``UsdPreviewSurface``, y up, in meters.

    The uncompressed archive holds a binary layer and PNG textures. The normal map uses USD's tangent frames, which
    follow +u and +v like those of glTF.

    Raises:
        ValueError: usd-core is missing, or the mesh has no texture coordinates.
    """
    if problem := usdz_problem():
        raise ValueError(problem)
    mesh = product.mesh
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    from PIL import Image
    from pxr import Sdf

    images = product.textures.named()
    with tempfile.TemporaryDirectory(prefix="scoredist3d-usd-") as temporary:
        folder = Path(temporary)
        for channel, image in images.items():
            Image.fromarray(image).save(folder / f"{channel}.png")
        layer = folder / f"{path.stem}.usdc"
        _write_layer(layer, mesh, list(images), product.double_sided, product.frame.y_up)
        # The writer aligns the files as the format requires; the layer must be the first one.
        archive = Sdf.ZipFileWriter.CreateNew(str(path))
        for file in [layer, *(folder / f"{channel}.png" for channel in images)]:
            archive.AddFile(str(file), file.name)
        if not archive.Save():
            raise OSError(f"usd-core could not write {path}")
    return [path]


def _write_layer(path: Path, mesh: Mesh, channels: list[str], double_sided: bool, frame: Frame) -> None:
    from pxr import Usd, UsdGeom, UsdShade

    stage = Usd.Stage.CreateNew(str(path))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    root = UsdGeom.Xform.Define(stage, "/Asset")
    stage.SetDefaultPrim(root.GetPrim())
    prim = _define_mesh(stage, mesh, double_sided, frame)
    material = _define_material(stage, channels)
    UsdShade.MaterialBindingAPI.Apply(prim).Bind(material)
    stage.GetRootLayer().Save()


def _define_mesh(stage: Any, mesh: Mesh, double_sided: bool, frame: Frame) -> Any:
    from pxr import Sdf, UsdGeom, Vt

    shape = UsdGeom.Mesh.Define(stage, "/Asset/Mesh")
    points = frame.points(mesh.vertices)
    shape.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(points))
    shape.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(np.stack([points.min(axis=0), points.max(axis=0)])))
    shape.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(mesh.faces), 3, dtype=np.int32)))
    shape.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(mesh.faces.ravel().astype(np.int32)))
    shape.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(frame.directions(mesh.vertex_normals())))
    shape.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    shape.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    shape.CreateDoubleSidedAttr(double_sided)
    coordinates = UsdGeom.PrimvarsAPI(shape).CreatePrimvar(
        "st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.faceVarying
    )
    assert mesh.uvs is not None and mesh.uv_faces is not None
    coordinates.Set(Vt.Vec2fArray.FromNumpy(np.ascontiguousarray(mesh.uvs, dtype=np.float32)))
    coordinates.SetIndices(Vt.IntArray.FromNumpy(mesh.uv_faces.ravel().astype(np.int32)))
    return shape.GetPrim()


def _define_material(stage: Any, channels: list[str]) -> Any:
    """A preview surface whose inputs are the textures ``<channel>.png``."""
    from pxr import Sdf, UsdShade

    types = Sdf.ValueTypeNames
    material = UsdShade.Material.Define(stage, "/Asset/Material")
    surface = UsdShade.Shader.Define(stage, "/Asset/Material/Surface")
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("roughness", types.Float).Set(1.0)
    surface.CreateInput("metallic", types.Float).Set(0.0)
    reader = UsdShade.Shader.Define(stage, "/Asset/Material/Coordinates")
    reader.CreateIdAttr("UsdPrimvarReader_float2")
    reader.CreateInput("varname", types.String).Set("st")
    st = reader.CreateOutput("result", types.Float2)
    inputs = {
        "base_color": ("diffuseColor", types.Color3f, "rgb"),
        "roughness": ("roughness", types.Float, "r"),
        "metallic": ("metallic", types.Float, "r"),
        "occlusion": ("occlusion", types.Float, "r"),
        "normal": ("normal", types.Normal3f, "rgb"),
    }
    for channel in channels:
        target, kind, output = inputs[channel]
        texture = UsdShade.Shader.Define(stage, f"/Asset/Material/{target.capitalize()}Texture")
        texture.CreateIdAttr("UsdUVTexture")
        texture.CreateInput("file", types.Asset).Set(Sdf.AssetPath(f"{channel}.png"))
        texture.CreateInput("sourceColorSpace", types.Token).Set("sRGB" if channel == "base_color" else "raw")
        texture.CreateInput("st", types.Float2).ConnectToSource(st)
        if channel == "normal":
            texture.CreateInput("scale", types.Float4).Set((2.0, 2.0, 2.0, 1.0))
            texture.CreateInput("bias", types.Float4).Set((-1.0, -1.0, -1.0, 0.0))
        for side in ("wrapS", "wrapT"):
            texture.CreateInput(side, types.Token).Set("repeat")
        made = texture.CreateOutput(output, types.Float3 if output == "rgb" else types.Float)
        surface.CreateInput(target, kind).ConnectToSource(made)
    material.CreateSurfaceOutput().ConnectToSource(surface.CreateOutput("surface", types.Token))
    return material
