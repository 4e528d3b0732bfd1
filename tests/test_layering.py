"""Imports point downwards only, and nothing optional or heavy is imported where it would slow the command line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "scoredist3d"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A package imports packages of lower levels and of its own level, never of higher ones.
LEVELS: dict[str, int] = {
    "ops": 0,
    "cameras": 0,
    "paths": 0,
    "terminal": 0,
    "seeding": 0,
    "limits": 0,
    "signals": 0,
    "files": 0,
    "reasons": 0,
    "registry": 1,
    "config": 1,
    "custom": 1,
    "tensor_files": 1,
    "nn": 2,
    "diffusion": 2,
    "meshes": 2,
    "geometry": 3,
    "materials": 3,
    "backgrounds": 3,
    "priors": 3,
    "procedural": 3,
    "prompts": 4,
    "renderers": 4,
    "guidance": 4,
    "losses": 4,
    "data": 4,
    "export": 4,
    "evaluation": 4,
    "systems": 5,
    "visualization": 6,
    "training": 7,
    "viewer": 7,
    "arguments": 8,
    "cli": 8,
    "__main__": 9,
}
# Packages that import nothing else of the project, except for the writing of files and the texts of system errors.
CLOSED = ("ops", "diffusion", "cameras", "paths", "terminal", "seeding", "limits", "signals", "files", "reasons")
# Third-party packages of each package, imports inside functions included. New ones are added here on purpose.
THIRD_PARTY: dict[str, set[str]] = {
    "backgrounds": {"torch"},
    "cameras": {"torch"},
    "cli": {"torch"},
    "config": {"omegaconf", "yaml"},
    "data": {"torch"},
    "diffusion": {"torch"},
    "evaluation": {"numpy", "scipy", "skimage", "torch"},
    "export": {"PIL", "imageio_ffmpeg", "numpy", "pxr", "scipy", "torch", "trimesh"},
    "geometry": {"PIL", "numpy", "scipy", "torch"},
    "guidance": {"diffusers", "peft", "safetensors", "torch"},
    "losses": {"torch"},
    "materials": {"torch"},
    "meshes": {"PIL", "fast_simplification", "numpy", "scipy", "skimage", "torch", "trimesh", "xatlas"},
    "nn": {"torch"},
    "ops": {"gsplat", "nerfacc", "numpy", "nvdiffrast", "safetensors", "tinycudann", "torch", "triton"},
    "priors": {"accelerate", "diffusers", "huggingface_hub", "safetensors", "torch"},
    "procedural": {"safetensors", "torch", "transformers"},
    "prompts": {"torch", "transformers"},
    "renderers": {"torch"},
    "seeding": {"torch"},
    "systems": {"torch"},
    "tensor_files": {"torch"},
    "training": {"lightning_fabric", "psutil", "pytorch_lightning", "torch"},
    "visualization": {"numpy", "torch"},
}
OPTIONAL = {"nerfacc", "tinycudann", "triton", "nvdiffrast", "gsplat"}
LIGHTNING = {"pytorch_lightning", "lightning"}
HUGGING_FACE = {"diffusers", "transformers"}
MAY_IMPORT_LIGHTNING = {
    "training/lightning_module.py",
    "training/callbacks.py",
    "training/distributed.py",
}


def name_of(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


def part_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_for(stem: str, package: str) -> bool:
    """Whether a file is named after an optional package: ``texture_triton`` or ``triton_backend``."""
    return stem.endswith(f"_{package}") or stem == f"{package}_backend"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Every node that runs; those of function bodies only on request, since they do not run at import."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
            continue
        yield child
        yield from nodes(child, inside_functions=inside_functions)


def imports(module: Path, *, inside_functions: bool) -> set[str]:
    """Dotted names that a module imports."""
    found = set()
    for node in nodes(ast.parse(module.read_text(encoding="utf-8")), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(module)}: relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(module: Path) -> set[str]:
    """Parts of the package that a module uses, function bodies included."""
    own = [name.split(".") for name in imports(module, inside_functions=True) if name.startswith("scoredist3d.")]
    return {name[1] for name in own if name[1] in LEVELS}


def roots_at_import(module: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(module, inside_functions=False)}


def test_every_part_has_a_level() -> None:
    parts = {part_of(module) for module in MODULES} - {"__init__"}
    assert parts <= set(LEVELS), "say in LEVELS where a new part stands"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_point_downwards(module: Path) -> None:
    part = part_of(module)
    used = parts_imported(module) - {part}
    if part in CLOSED:
        assert used <= {"files", "reasons"}, f"{part} imports nothing of ours but files and reasons"
    upwards = {other for other in used if LEVELS[other] > LEVELS.get(part, 0)}
    assert upwards == set(), f"{part} (level {LEVELS.get(part)}) must not import what stands above it"


def test_third_party_packages_are_those_of_the_list() -> None:
    found: dict[str, set[str]] = {}
    for module in MODULES:
        roots = {name.split(".")[0] for name in imports(module, inside_functions=True)}
        found.setdefault(part_of(module), set()).update(roots - set(sys.stdlib_module_names) - {"scoredist3d"})
    assert {part: names for part, names in found.items() if names} == THIRD_PARTY


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_nothing_optional_or_slow_at_import(module: Path) -> None:
    roots = roots_at_import(module)
    # A file named after an optional package holds code for it alone; the test below keeps it from being imported early.
    assert {root for root in roots & OPTIONAL if not is_for(module.stem, root)} == set()
    assert not roots & HUGGING_FACE, "import diffusers and transformers where a model is loaded"
    if name_of(module) not in MAY_IMPORT_LIGHTNING:
        assert not roots & LIGHTNING, "only the training callbacks may import Lightning"


@pytest.mark.parametrize("module", [PACKAGE / "__init__.py", PACKAGE / "registry.py", PACKAGE / "cli.py"], ids=name_of)
def test_the_way_in_is_light(module: Path) -> None:
    assert not roots_at_import(module) & {"torch", "numpy", "omegaconf", "yaml"}


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_files_for_an_optional_package_are_imported_on_demand(module: Path) -> None:
    names = {part for name in imports(module, inside_functions=False) for part in name.split(".")[1:]}
    others = {package for package in OPTIONAL if not is_for(module.stem, package)}  # one's own may be used
    early = {name for name in names if any(is_for(name, package) for package in others)}
    files = {file.stem for file in MODULES}
    assert early & files == set(), "import it inside the function that has chosen this backend"


def test_the_optional_packages_are_really_looked_for() -> None:
    source = "import triton\ndef f():\n    import nerfacc\nif TYPE_CHECKING:\n    import gsplat\n"
    found = {
        node.names[0].name for node in nodes(ast.parse(source), inside_functions=False) if isinstance(node, ast.Import)
    }
    assert found == {"triton"}
