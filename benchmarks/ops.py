"""Measures every operator with every backend that is usable on this machine and prints a Markdown table.

    python benchmarks/ops.py                      # the sizes of configs/fast.yaml, on the CPU
    python benchmarks/ops.py --device cuda --points 1048576 --levels 16 --log2-hashmap-size 19 --base-resolution 16 \
        --per-level-scale 1.447 --rays 262144

    python benchmarks/ops.py --only rasterize splatting

Each row has the median and the minimum wall time of --repeats calls after --warm-up calls, in milliseconds. Slow
references are called less often: a row ends after --seconds and says how many calls it counts. If nvdiffrast and gsplat
are installed, their whole pipelines are measured for comparison.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import scoredist3d

import torch  # isort: skip  (after scoredist3d, which makes OpenMP threads sleep while they wait)
from ops_common import Row, usable  # isort: skip
from ops_meshes import distance_rows, flexicubes_rows, rasterize_rows, tetrahedra_rows  # isort: skip
from ops_splatting import parse_size, splatting_rows  # isort: skip
from scoredist3d.ops.hash_grid import encoding as hash_grid
from scoredist3d.ops.hash_grid.spec import HashGridSpec
from scoredist3d.ops.volume_rendering import compositing, ray_marching


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(describe_machine(device))
    print("\n| operator | backend | median ms | minimum ms |\n| --- | --- | --- | --- |")
    for group in arguments.only or GROUPS:
        for operator, backend, call in GROUPS[group](arguments, device):
            print(f"| {operator} | {backend} | {timed(call, device, arguments)} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's default")
    parser.add_argument("--points", type=int, default=150_000)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--features", type=int, default=2)
    parser.add_argument("--log2-hashmap-size", type=int, default=14)
    parser.add_argument("--base-resolution", type=int, default=8)
    parser.add_argument("--per-level-scale", type=float, default=1.5)
    parser.add_argument("--rays", type=int, default=4096)
    parser.add_argument("--step-size", type=float, default=2 / 64)
    parser.add_argument("--views", type=int, default=1, help="images at once, rasterized and splatted")
    parser.add_argument("--subdivisions", type=int, default=5, help="of the sphere: 20 * 4^this triangles")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[256, 512], help="pixels per side, rasterized")
    parser.add_argument("--splats", type=parse_size, nargs="+", metavar="GAUSSIANS@PIXELS", help="for example 5000@128")
    parser.add_argument("--tetrahedra", type=int, nargs="+", default=[32, 64, 128], help="steps along an axis, even")
    parser.add_argument("--flexicubes", type=int, nargs="+", default=[32, 64], help="cubes along an axis")
    parser.add_argument("--distance-points", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="a row begins no further call after this time")
    return parser.parse_args()


def describe_machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, scoredist3d {scoredist3d.__version__}"
    return f"{name}, {torch.get_num_threads()} threads; {versions}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def timed(call: Callable[[], object], device: torch.device, arguments: argparse.Namespace) -> str:
    """Median and minimum as two cells; a package that fails (its kernels do not build) costs its own rows only."""
    try:
        times = measure(call, device, arguments.warm_up, arguments.repeats, arguments.seconds)
    except (AttributeError, ImportError, RuntimeError) as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]} |"
    calls = "" if len(times) == arguments.repeats else f" (calls: {len(times)})"
    return f"{statistics.median(times):.2f}{calls} | {min(times):.2f}"


def measure(
    call: Callable[[], object], device: torch.device, warm_up: int, repeats: int, seconds: float
) -> list[float]:
    """Wall times in milliseconds: of the calls after the warm-up or, if time runs out before, of the last call.

    The first call does not use up time, since kernels may be compiled in it.
    """
    times: list[float] = []
    while len(times) < warm_up + repeats and sum(times[1:]) < 1e3 * seconds:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times[min(warm_up, len(times) - 1) :]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_spec(arguments: argparse.Namespace) -> HashGridSpec:
    sizes = (arguments.log2_hashmap_size, arguments.base_resolution, arguments.per_level_scale)
    return HashGridSpec(arguments.levels, arguments.features, *sizes)


def ray_points(count: int, generator: torch.Generator) -> torch.Tensor:
    """Points along rays through the unit cube, 64 on each: neighbors share cells, as they do in rendering."""
    rays = -(-count // 64)
    ends = torch.rand(2, rays, 1, 3, generator=generator)
    along = torch.linspace(0, 1, 64)[None, :, None]
    return (ends[0] + (ends[1] - ends[0]) * along).reshape(-1, 3)[:count].contiguous()


def hash_grid_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    spec = make_spec(arguments)
    generator = torch.Generator().manual_seed(0)
    points = ray_points(arguments.points, generator).to(device)
    table = (1e-4 * torch.randn(spec.num_entries, spec.features_per_level, generator=generator)).to(device)
    upstream = torch.randn(arguments.points, spec.output_dim, generator=generator).to(device)
    table.requires_grad_()
    moving = points.clone().requires_grad_()
    size = f"hash grid {spec.num_levels} x {spec.features_per_level}, 2^{spec.log2_hashmap_size}, {len(points)} points"
    for name in usable(hash_grid.BACKENDS, device):
        encode = partial(encode_and_differentiate, table=table, spec=spec, upstream=upstream, backend=name)
        yield f"{size}: forward", name, partial(encode, points, ())
        yield f"{size}: + table gradient", name, partial(encode, points, (table,))
        yield f"{size}: + table and point gradients", name, partial(encode, moving, (table, moving))


def encode_and_differentiate(
    points: torch.Tensor,
    wanted: tuple[torch.Tensor, ...],
    table: torch.Tensor,
    spec: HashGridSpec,
    upstream: torch.Tensor,
    backend: str,
) -> None:
    features = hash_grid.hash_grid_encode(points, table, spec, backend=backend)
    if wanted:
        torch.autograd.grad(features, wanted, upstream)


def field_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """What the small network behind the grid costs beside it."""
    spec = make_spec(arguments)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(arguments.points, spec.output_dim, generator=generator).to(device).requires_grad_()
    layers = [torch.nn.Linear(spec.output_dim, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)]
    network = torch.nn.Sequential(*layers).to(device)
    inputs = [features, *network.parameters()]
    upstream = torch.ones(arguments.points, 4, device=device)
    size = f"network {spec.output_dim}-32-4, {arguments.points} points"

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return network(features)

    yield f"{size}: forward", "torch", forward
    yield f"{size}: + gradients", "torch", lambda: torch.autograd.grad(network(features), inputs, upstream)


def camera_rays(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays of a square image of the unit ball, seen from three units away."""
    side = max(1, round(count**0.5))
    axis = torch.linspace(-1, 1, side)
    target = torch.stack(torch.meshgrid(torch.zeros(1), axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
    origins = torch.tensor([[3.0, 0.0, 0.0]]).repeat(len(target), 1)
    return origins, torch.nn.functional.normalize(target - origins, dim=1)


def marching_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    origins, directions = (tensor.to(device) for tensor in camera_rays(arguments.rays, generator))
    jitter = torch.rand(len(origins), generator=generator).to(device)
    occupancy = (torch.rand(32, 32, 32, generator=generator) < 0.3).to(device)
    for label, grid in (("full ball", None), ("32^3, 30 % occupied", occupancy)):
        for name in usable(ray_marching.BACKENDS, device):

            def march(backend: str = name, grid: torch.Tensor | None = grid) -> ray_marching.RaySamples:
                settings = {"radius": 1.0, "step_size": arguments.step_size}
                return ray_marching.march_rays(
                    origins, directions, occupancy=grid, jitter=jitter, backend=backend, **settings
                )

            yield f"ray marching {len(origins)} rays, {label}, {len(march())} intervals", name, march


def compositing_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    rays = tuple(tensor.to(device) for tensor in camera_rays(arguments.rays, generator))
    samples = ray_marching.march_rays(*rays, radius=1.0, step_size=arguments.step_size)
    densities = (20 * torch.rand(len(samples), generator=generator) ** 4).to(device).requires_grad_()
    colors = torch.rand(len(samples), 3, generator=generator).to(device).requires_grad_()
    size = f"compositing {len(samples)} intervals, color and opacity"
    for name in usable(compositing.BACKENDS, device):
        image = partial(composite_and_differentiate, samples=samples, backend=name)
        yield f"{size}: forward", name, partial(image, densities.detach(), colors.detach())
        yield f"{size}: + gradients", name, partial(image, densities, colors)


def composite_and_differentiate(
    densities: torch.Tensor, colors: torch.Tensor, samples: ray_marching.RaySamples, backend: str
) -> None:
    weights = compositing.render_weights(densities, samples, backend=backend)
    rgb = compositing.accumulate(weights, colors, samples, backend=backend)
    opacity = compositing.accumulate(weights, None, samples, backend=backend)
    if densities.requires_grad:
        torch.autograd.grad((rgb + opacity).sum(), (densities, colors))


GROUPS: dict[str, Callable[[argparse.Namespace, torch.device], Iterator[Row]]] = {
    "hash-grid": hash_grid_rows,
    "network": field_rows,
    "marching": marching_rows,
    "compositing": compositing_rows,
    "rasterize": rasterize_rows,
    "splatting": splatting_rows,
    "tetrahedra": tetrahedra_rows,
    "flexicubes": flexicubes_rows,
    "distance": distance_rows,
}

if __name__ == "__main__":
    main()
