"""Fast training steps: the layers give the same results, and the losses can be captured as CUDA graphs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prior_training.acceleration import GradientStep, accelerate
from prior_training.denoiser import Denoiser
from prior_training.flow import FlowModel, loss_function
from prior_training.flow_models import FlowSizes, build_clip, build_transformer
from prior_training.models import PriorSizes, build_text_encoder, build_unet, build_vae
from prior_training.vae import AutoencoderLoss
from shared.triton_compilation import compile_for_hopper
from torch.utils._python_dispatch import TorchDispatchMode

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.procedural import build_tokenizer
from scoredist3d.procedural.probe import Probe

SIZES = PriorSizes.miniature()
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def denoiser(tmp_path):
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    model = seeded(lambda: Denoiser(build_unet(SIZES), build_text_encoder(SIZES, tokenizer)))
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, SIZES.latent_channels, 8, 8, generator=generator)
    ids = torch.randint(0, 50, (2, tokenizer.model_max_length), generator=generator)
    ids[:, -1] = tokenizer.eos_token_id
    camera = torch.randn(2, 16, generator=generator)
    return model, (z, torch.tensor([10, 700]), ids, camera)


def autoencoder():
    vae = seeded(lambda: build_vae(SIZES))
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return vae, (image,)


def gradients(module, output):
    return torch.autograd.grad(output.square().sum(), list(module.parameters()), allow_unused=True)


def assert_same_results(module, call, **options):
    """``call`` gives the same output and gradients for the module and for its accelerated copy."""
    module.double()
    fast = copy.deepcopy(module)
    accelerate(fast, **options)
    outputs = [call(network) for network in (module, fast)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-7, atol=1e-9)
    for a, b in zip(*(gradients(m, o) for m, o in zip((module, fast), outputs, strict=True)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9 * float(1 + a.abs().max()))
    assert fast.state_dict().keys() == module.state_dict().keys()


# torch.compile looks at the gradient of intermediate results.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_give_the_same_predictions_and_gradients(tmp_path, monkeypatch):
    compiled = []

    def compile_(function, **options):
        compiled.append(options)
        return torch_compile(function, backend="eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    model, (z, t, ids, camera) = denoiser(tmp_path)
    assert_same_results(model, lambda network: network(z.double(), t, ids, camera.double()), compile_=True)
    assert compiled == 7 * [{"dynamic": False}]


def test_accelerated_denoiser_gives_the_same_predictions_and_gradients(tmp_path):
    model, inputs = denoiser(tmp_path)
    z, t, ids, camera = inputs
    assert_same_results(model, lambda network: network(z.double(), t, ids, camera.double()))


def test_accelerated_autoencoder_gives_the_same_images_and_gradients():
    vae, (image,) = autoencoder()
    assert_same_results(vae, lambda network: network.decode(network.encode(image.double()).latent_dist.mean).sample)


def test_accelerated_probe_gives_the_same_features_and_gradients():
    probe = seeded(lambda: Probe(("a", "b"), ("red", "blue"), ("plain",), width=8, input_size=32))
    images = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(2))

    def features(network):
        reading = network(images.double())
        return torch.cat(
            [
                reading.category,
                reading.color,
                reading.second_color,
                reading.pattern,
                reading.present,
                reading.direction.flatten(1),
            ],
            1,
        )

    assert_same_results(probe, features)


class Synchronizations(TorchDispatchMode):
    """Records operators that wait for the device or depend on values; a CUDA graph cannot contain them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "randn", "rand.", "bernoulli", "unique")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_losses_do_not_synchronize(tmp_path):
    model, (z, t, ids, camera) = denoiser(tmp_path)
    accelerate(model)
    vae, (image,) = autoencoder()
    accelerate(vae)
    sizes = FlowSizes.miniature()
    tokenizer = build_tokenizer(tmp_path / "flow_tokenizer")
    flow = seeded(
        lambda: FlowModel(
            build_transformer(sizes, SIZES.latent_channels, 8),
            build_clip(sizes, tokenizer),
            build_clip(sizes, tokenizer),
        )
    )
    noise = torch.zeros_like(z)
    velocity_loss = loss_function(flow, FlowSchedule(3.0), 0)
    with Synchronizations() as seen:
        model(z, t, ids, camera).sum().backward()
        velocity_loss(z, noise, torch.tensor([0.1, 0.9]), ids, camera).backward()
        AutoencoderLoss(vae)(
            image, torch.zeros(2, SIZES.latent_channels, 8, 8), 0.1 * image[:1], torch.tensor(0.5)
        ).backward()
    assert seen.found == []


def test_gradient_step_replaces_the_gradients():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    step = GradientStep(lambda x: (weight * x).sum(), [weight], torch.device("cpu"))
    for x in (torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])):
        loss = step(x)
        assert torch.equal(weight.grad, x) and not loss.requires_grad
        assert float(loss) == float((weight.detach() * x).sum())


TYPES = dict.fromkeys(("x", "grad", "out"), "*bf16") | dict.fromkeys(
    ("sums", "scale", "bias", "slope", "constant"), "*fp32"
)
TYPES |= dict.fromkeys(("pixels", "channels"), "i32")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process"
)
@pytest.mark.parametrize("name", ["_sums_kernel", "_apply_kernel", "_gradient_sums_kernel", "_gradient_kernel"])
def test_kernels_compile_for_hopper(name, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from prior_training import group_norm

    constants = {"ROWS": 64, "COLUMNS": 64} | ({} if name == "_sums_kernel" else {"ACTIVATE": True})
    assert compile_for_hopper(getattr(group_norm, name), constants, TYPES) > 1000


def test_group_norm_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    script = Path(__file__).with_name("interpreted_group_norm.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("equal") == 3, done.stdout + done.stderr


@on_gpu
def test_captured_gradients_equal_those_of_the_plain_network(tmp_path):
    device = torch.device("cuda")
    model, inputs = denoiser(tmp_path)
    model.to(device)
    inputs = [x.to(device) for x in inputs]
    fast = copy.deepcopy(model)
    accelerate(fast)

    def loss_of(network):
        return lambda *tensors: network(*tensors).float().square().mean()

    steps = [
        GradientStep(loss_of(network), list(network.parameters()), device, capture=network is fast)
        for network in (model, fast)
    ]
    for scale in (1.0, 0.5):  # the second call replays the graph with other inputs
        scaled = [scale * inputs[0], *inputs[1:]]
        losses = [float(step(*scaled)) for step in steps]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), fast.parameters(), strict=True)]
        norm = torch.stack([p.norm() for p, _ in pairs if p is not None]).norm()
        off = torch.stack([(p - q).norm() for p, q in pairs if p is not None]).norm()
        assert off < 0.05 * norm


@on_gpu
def test_two_graphs_of_the_same_parameters_take_turns():
    device = torch.device("cuda")
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=device))
    steps = [GradientStep(lambda x, k=k: k * (weight * x).sum(), [weight], device) for k in (1.0, 10.0)]
    for turn in range(4):
        x = torch.full((2,), 1.0 + turn, device=device)
        steps[turn % 2](x)
        torch.testing.assert_close(weight.grad, (1.0, 10.0)[turn % 2] * x)
