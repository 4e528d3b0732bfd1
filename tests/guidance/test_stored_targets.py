"""HiFA with targets that are kept for several steps: their gradient, when they are replaced, and checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared.method_cases import SIZE, CountingPrior, latents, method, prompted, views
from shared.tiny_runs import Recorder, plain

from scoredist3d.cameras import Cameras
from scoredist3d.config import FieldError
from scoredist3d.config.validation import validate
from scoredist3d.guidance.core.image_space import with_image_term
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.guidance.core.stored_targets import StoredTargets
from scoredist3d.guidance.hifa import HiFA
from scoredist3d.seeding import Rng
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.run import run_training

OPTIONS = {"weight": 1.0, "guidance_scale": 3.0, "latent_weight": 0.0, "image_weight": 0.3, "t_min": 0.4, "t_max": 0.4}


def kept(every: int = 3, prior: CountingPrior | None = None, **options) -> HiFA:
    guidance = method("hifa", prior or CountingPrior(), update_every=every, **OPTIONS, **options)
    assert isinstance(guidance, HiFA)
    return guidance


def maps(seed: int, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.rand(
        batch, SIZE, SIZE, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


def run(guidance: HiFA, step: int, cameras: Cameras, *, color=1, alpha=2, background=3):
    """Gradients with respect to color (before compositing) and opacity of one step."""
    color, alpha, background = maps(color), maps(alpha, 1), maps(background).detach()
    rgb = alpha * color + (1 - alpha) * background
    z = latents(2)
    loss = guidance(
        z,
        prompted(guidance, cameras=cameras),
        step,
        Rng(),
        rgb=rgb,
        opacity=alpha,
        depth=torch.ones_like(alpha),
        particles=(0, 0),
        background=background,
    ).loss
    return torch.autograd.grad(loss, (color, alpha)), (color, alpha, background)


def test_a_new_target_is_the_image_term_of_hifa():
    guidance, cameras = kept(), views(2)
    conditions, z, rgb = prompted(guidance, cameras=cameras), latents(2), maps(1)
    shown = {"rgb": rgb, "opacity": maps(2, 1), "background": maps(3).detach()}
    context = guidance.begin(z, 0, Rng(), particles=(0, 0), **shown)
    score = guidance.score_gradient(z, conditions, context)
    target = guidance.target(guidance.noised(z, context)[0], conditions, context)
    expected = with_image_term(
        Score(torch.zeros_like(z)), guidance.prior, z, target, context, guidance.config.weighting, 0.3
    )
    torch.testing.assert_close(score.rgb_gradient, expected.rgb_gradient, rtol=0, atol=1e-12)
    assert not score.gradient.any() and not score.opacity_gradient.any()  # the background has not changed


def test_later_renders_are_compared_over_the_background_of_the_target():
    """The gradient is that of w/2 ||a c + (1 - a) b' - T||^2 with the kept target T and its background b'."""
    guidance, cameras = kept(), views(2)
    _, (_, _, first) = run(guidance, 0, cameras, background=3)
    target, behind, _ = guidance.stored.get(guidance.stored.keys((0, 0), cameras))
    torch.testing.assert_close(behind, first)
    (by_color, by_alpha), (color, alpha, _) = run(guidance, 1, cameras, color=4, alpha=5, background=6)
    loss = 0.5 * 0.3 * (alpha * color + (1 - alpha) * behind - target).square().sum() / 2
    expected = torch.autograd.grad(loss, (color, alpha))
    torch.testing.assert_close(by_color, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(by_alpha, expected[1], rtol=0, atol=1e-12)


def test_the_prior_is_evaluated_once_per_view_and_round():
    prior, cameras = CountingPrior(), views(4)
    guidance = kept(3, prior, denoise_steps=2)
    shown, calls = [cameras[:2], cameras[2:]], []
    for step in range(7):
        now = shown[step % 2]
        reads = guidance.reads_latents(step, now, (0, 0))
        context = guidance.begin(latents(2), step, Rng(), particles=(0, 0))
        assert guidance.nfe(prompted(guidance, cameras=now), context).prior == (4 if reads else 0)
        prior.rows.clear()
        run(guidance, step, now)
        assert bool(prior.rows) == reads
        calls.append(reads)
    # Rounds begin at steps 0, 3 and 6; each view is updated when it is first shown in a round.
    assert calls == [True, True, False, True, True, False, True]
    assert guidance.reads_latents(5, views(3)[1:], (0, 1))  # another particle
    turned = views(2)
    turned.c2w[0, 0, 3] += 0.1
    assert guidance.reads_latents(5, turned, (0, 0))  # another camera


def test_targets_of_every_step_are_not_kept():
    guidance = method("hifa", CountingPrior())
    assert guidance.stored is None and guidance.reads_latents(5, views(2), (0, 0))


def test_targets_survive_a_checkpoint():
    first, second, cameras = kept(), kept(), views(2)
    assert first.state_dict()["stored._extra_state"] == {}
    run(first, 0, cameras)
    second.load_state_dict(first.state_dict())
    for one, two in zip(run(first, 1, cameras)[0], run(second, 1, cameras)[0], strict=True):
        assert torch.equal(one, two)
    assert not second.reads_latents(1, cameras, (0, 0))


def test_further_maps_are_kept_with_the_targets():
    stored, cameras = StoredTargets(2, 7), views(2)
    keys = stored.keys((0, 0), cameras)
    images, backgrounds, surfaces = (maps(seed, channels).detach() for seed, channels in ((1, 3), (2, 3), (3, 7)))
    stored.put((0, 0), cameras, 0, images, backgrounds, surfaces)
    for found, expected in zip(stored.get(keys[::-1]), (images, backgrounds, surfaces), strict=True):
        assert torch.equal(found, expected.flip(0))
    restored = StoredTargets(2, 7)
    restored.load_state_dict(stored.state_dict())
    assert not restored.outdated(keys, 1)
    for found, expected in zip(restored.get(keys), (images, backgrounds, surfaces), strict=True):
        assert torch.equal(found, expected)
    stored.put((0, 0), cameras, 2, images, backgrounds)
    assert stored.get(keys)[2].shape == (2, SIZE, SIZE, 0)
    assert stored.outdated(keys, 2)  # these targets lack the maps


def filled(particles: tuple[int, ...] = (0, 1, 0), size: int = SIZE) -> tuple[StoredTargets, Cameras, torch.Tensor]:
    """Targets of views with different fields of view, the cameras, and their further maps."""
    stored, cameras = StoredTargets(4, 7), views(len(particles))
    cameras = replace(cameras, fovy=torch.linspace(0.5, 0.9, len(particles)), height=size, width=2 * size)
    drawn = [draw(seed, channels, len(particles), size) for seed, channels in ((1, 3), (2, 3), (3, 7))]
    stored.put(particles, cameras, 0, *drawn)
    return stored, cameras, drawn[-1]


def draw(seed: int, channels: int, batch: int, size: int) -> torch.Tensor:
    return torch.rand(batch, size, 2 * size, channels, generator=torch.Generator().manual_seed(seed))


def assert_shown(stored: StoredTargets, particle: int, cameras: Cameras, surfaces: torch.Tensor) -> None:
    """The targets of a particle have the given cameras and maps, in this order."""
    found, maps = stored.maps(particle)
    assert torch.equal(maps, surfaces)
    assert torch.equal(found.c2w, cameras.c2w) and torch.equal(found.fovy, cameras.fovy)
    assert (found.height, found.width) == (cameras.height, cameras.width)


def test_the_maps_of_a_particle_are_found_with_their_cameras():
    stored, cameras, surfaces = filled()
    restored = StoredTargets(4, 7)
    assert restored.maps(0) is None
    restored.load_state_dict(stored.state_dict())
    for targets in (stored, restored):
        assert_shown(targets, 0, cameras[::2], surfaces[::2])
        assert_shown(targets, 1, cameras[1:2], surfaces[1:2])
        assert targets.maps(2) is None
    # New maps replace those of the same view; a new round drops the others.
    stored.put((0,), cameras[:1], 3, *(draw(seed, channels, 1, SIZE) for seed, channels in ((4, 3), (5, 3), (6, 7))))
    assert_shown(stored, 0, cameras[::2], torch.cat([draw(6, 7, 1, SIZE), surfaces[2:]]))
    stored.put((0,), cameras[:1], 4, *(draw(seed, channels, 1, SIZE) for seed, channels in ((4, 3), (5, 3), (6, 7))))
    assert_shown(stored, 0, cameras[:1], draw(6, 7, 1, SIZE))
    assert stored.maps(1) is None


def test_targets_without_the_maps_give_none():
    stored, cameras, _ = filled()
    images = draw(1, 3, 1, SIZE)
    stored.put((3,), cameras[:1], 8, images, images)
    assert stored.maps(3) is None and stored.outdated(stored.keys((3,), cameras[:1]), 8)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_targets_with_other_shapes_are_made_again(changed):
    """Sizes may change within a round, but a checkpoint holds one tensor of each map."""
    stored, cameras, _ = filled((0, 0, 0, 0))
    keys = stored.keys((0, 0), cameras[:2])
    shapes = [(1, 3, 2, SIZE), (2, 3, 2, SIZE), (3, 7, 2, SIZE)]
    shapes[changed] = (*shapes[changed][:3], 2 * SIZE) if changed < 2 else (3, 5, 2, SIZE)
    stored.put((0, 0), cameras[:2], 1, *(draw(*shape) for shape in shapes))
    others = stored.keys((0, 0), cameras[2:])
    assert stored.outdated(others, 1) and stored.outdated(keys, 1) == (changed == 2)
    restored = StoredTargets(4, 7)
    restored.load_state_dict(stored.state_dict())
    assert torch.equal(restored.get(keys)[changed], draw(*shapes[changed]))
    assert (restored.maps(0) is None) == (changed == 2)


@pytest.mark.parametrize("lacking", [("fovys",), ("fovys", "surfaces")])
def test_targets_of_earlier_versions_give_no_maps(lacking):
    stored, cameras, surfaces = filled((0, 0, 0))
    state = stored.state_dict()
    for name in lacking:
        del state["_extra_state"][name]
    earlier = StoredTargets(4, 7 if len(lacking) == 1 else 0)
    earlier.load_state_dict(state)
    keys = earlier.keys((0, 0, 0), cameras)
    assert not earlier.outdated(keys, 1) and earlier.maps(0) is None
    assert torch.equal(earlier.get(keys)[0], stored.get(keys)[0])
    if len(lacking) == 1:  # targets that are made later have maps
        images = draw(7, 3, 1, SIZE)
        earlier.put((0,), cameras[1:2], 1, images, images, surfaces[2:])
        assert_shown(earlier, 0, cameras[1:2], surfaces[2:])
        again = StoredTargets(4, 7)
        again.load_state_dict(earlier.state_dict())
        assert_shown(again, 0, cameras[1:2], surfaces[2:])
        assert not again.outdated(keys, 1)


@pytest.mark.parametrize("lacking", [("surfaces",), ("fovys",), ("surfaces", "fovys")])
def test_a_checkpoint_of_an_earlier_version_is_loaded(lacking):
    """Earlier versions saved images and backgrounds alone, or no fields of view."""
    first, second, cameras = kept(), kept(), views(2)
    run(first, 0, cameras)
    state = first.state_dict()
    for name in lacking:
        del state["stored._extra_state"][name]
    second.load_state_dict(state)
    for one, two in zip(run(first, 1, cameras)[0], run(second, 1, cameras)[0], strict=True):
        assert torch.equal(one, two)
    assert not second.reads_latents(1, cameras, (0, 0))
    third = kept()
    third.load_state_dict({"stored._extra_state": {}})
    assert third.reads_latents(0, cameras, (0, 0))


def test_what_cannot_be_kept_is_refused():
    guidance = kept()
    with pytest.raises(FieldError, match="only for renders of a 3D scene"):
        guidance(latents(2), prompted(guidance), 0, Rng())
    with pytest.raises(ValueError, match="update_every: the latent term needs a new target at every step"):
        method("hifa", CountingPrior(), update_every=2, latent_weight=0.5)


def config(folder: Path, steps: int):
    block = plain(folder, trainer={"max_steps": steps})
    block["system"]["guidance"] = {"type": "hifa", "update_every": 3, "latent_weight": 0, "denoise_steps": 1}
    block["data"] = {**block.get("data", {}), "num_views": 4, "batch_size": 2}
    return validate(block)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """The run stops while targets are in use, and continues with them."""
    whole = run_training(config(tmp_path / "whole", 5), devices="cpu", console=Recorder())
    half = run_training(config(tmp_path / "half", 2), devices="cpu", console=Recorder())
    resumed = run_training(config(tmp_path / "half", 5), devices="cpu", resume=half.folder, console=Recorder())
    first, second = (read_checkpoint(done.folder / "ckpts" / "last.ckpt")["state_dict"] for done in (whole, resumed))
    name = "guidance.stored._extra_state"
    assert len(first[name]["poses"]) == 4 and torch.equal(first[name]["images"], second[name]["images"])
    assert all(torch.equal(first[key], second[key]) for key in first if isinstance(first[key], torch.Tensor))
