"""CNN_SP: its shape, its parameters, and that weights pass from one pooling to another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnsp import CNN_SP
from cnnsp.network import POOLINGS


class Replication(nn.Module):
    """The network as a user of the replication has it, max pooling and all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 40, 3, stride=3, padding=1)
        self.conv2 = nn.Conv2d(40, 80, 5, stride=3, padding=0)
        self.conv3 = nn.Conv2d(80, 120, 3, stride=3, padding=1)
        self.conv4 = nn.Conv2d(120, 120, 3, stride=1, padding=1)
        self.conv5 = nn.Conv2d(120, 120, 3, stride=1, padding=1)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.fc1 = nn.Linear(12000, 100)
        self.fc2 = nn.Linear(100, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            x = self.pool(F.relu(conv(x)))
        x = F.relu(self.fc1(x.view(-1, 12000)))
        return F.log_softmax(self.fc2(x), dim=1)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_shapes_and_parameters(pooling: str) -> None:
    model = CNN_SP(pooling=pooling)
    assert sum(p.numel() for p in model.parameters()) == 1_627_563
    planes = []
    handle = model.pool.register_forward_hook(lambda _m, _i, out: planes.append(tuple(out.shape)))
    output = model(torch.randn(2, 3, 256, 256))
    handle.remove()
    assert planes == [(2, 40, 86, 86), (2, 80, 28, 28), *[(2, 120, 10, 10)] * 3]
    assert output.shape == (2, 3)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(2))


def test_log_probabilities_under_autocast_are_in_fp32() -> None:
    model = CNN_SP(pooling="avg").eval()
    images = torch.randn(2, 3, 256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(2))
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("pooling", POOLINGS)
def test_weights_of_the_replication_load_strictly(pooling: str) -> None:
    theirs, ours = Replication(), CNN_SP(3, pooling)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if pooling == "max":
        images = torch.randn(2, 3, 256, 256)
        torch.testing.assert_close(ours.eval()(images), theirs(images))


def test_stochastic_block_fuses_bias_and_relu() -> None:
    """In evaluation a block gives Σw²/Σw of its rectified activations, spelt out here."""
    model = CNN_SP().eval()
    x = torch.randn(2, 3, 31, 29)
    rectified = F.relu(model.conv1(x))
    sums = F.avg_pool2d(rectified, 3, 1, 1, divisor_override=1)
    squares = F.avg_pool2d(rectified**2, 3, 1, 1, divisor_override=1)
    expected = torch.where(sums > 0, squares / sums, 0)
    torch.testing.assert_close(model._block(x, model.conv1), expected)


def test_convolutions_are_called_and_may_be_replaced() -> None:
    """By hooks, as Grad-CAM has them, and by whatever a user puts in their place."""
    model, images, called = CNN_SP().eval(), torch.randn(1, 3, 256, 256), []
    model.conv5.register_forward_hook(lambda module, _, output: called.append(output))
    expected = model(images)
    assert len(called) == 1
    plain = nn.Conv2d(120, 120, 3, padding=1)
    plain.load_state_dict(model.conv4.state_dict())
    model.conv4 = plain
    torch.testing.assert_close(model(images), expected)
    nn.utils.parametrizations.weight_norm(model.conv2).parametrizations.weight.original0.data *= 2
    assert not torch.allclose(model(images), expected)


def test_every_parameter_gets_a_gradient() -> None:
    model = CNN_SP()
    F.nll_loss(model(torch.randn(2, 3, 256, 256)), torch.tensor([0, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_memory_format_changes_nothing() -> None:
    model, images = CNN_SP(), torch.randn(1, 3, 256, 256)
    torch.manual_seed(1)
    contiguous = model(images)
    torch.manual_seed(1)
    channels_last = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(contiguous, channels_last, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"12000 features; got \[1, 3, 224, 224\]"):
        CNN_SP(pooling="max")(torch.zeros(1, 3, 224, 224))
    with pytest.raises(ValueError, match="'median'"):
        CNN_SP(pooling="median")
    with pytest.raises(ValueError, match="num_classes"):
        CNN_SP(0)
