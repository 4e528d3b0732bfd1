"""The small fully connected network."""

import torch

from scoredist3d.nn.mlp import MLP


def test_forward_by_hand():
    network = MLP([2, 2, 2], torch.Generator())
    with torch.no_grad():
        network.weights[0].copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
        network.biases[0].copy_(torch.tensor([0.5, -3.0]))
        network.weights[1].copy_(torch.tensor([[2.0, 1.0], [0.0, -1.0]]))
        network.biases[1].copy_(torch.tensor([0.0, 1.0]))
    # Hidden: relu(1 - (-1) + 0.5) = 2.5, relu(2 - 3) = 0; outputs: 5, 1.
    x = torch.tensor([[1.0, -1.0]])
    assert torch.equal(network(x), torch.tensor([[5.0, 1.0]]))
    assert torch.equal(network(x, num_outputs=1), torch.tensor([[5.0]]))


def test_initialisation_is_seeded_and_keeps_the_scale():
    state = torch.random.get_rng_state()
    first, again = (MLP([64, 256, 256, 8], torch.Generator().manual_seed(3)) for _ in range(2))
    other = MLP([64, 256, 256, 8], torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.weights[0], other.weights[0])
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    # He initialization preserves the second moment through ReLU layers and doubles it in the last, linear one.
    assert 1.0 < first(x).square().mean() < 4.0


def test_gradients():
    network = MLP([3, 5, 2], torch.Generator()).double()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    parameters = list(network.parameters())

    def apply(x, *values):
        names = [name for name, _ in network.named_parameters()]
        return torch.func.functional_call(network, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(apply, (x, *parameters))
