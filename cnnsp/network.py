"""The network: five convolutions, each followed by ReLU and a pool, and two linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_pooling import StochasticPool2d

from . import IMAGE_SIZE, POOLINGS


def _make_pool(pooling: str) -> nn.Module:
    # Overlapping windows that keep the plane's size.
    if pooling == "stochastic":
        return StochasticPool2d(3, stride=1, padding=1)
    if pooling == "max":
        return nn.MaxPool2d(3, stride=1, padding=1)
    if pooling == "avg":
        # Padding is no candidate in the other two pools, so it does not count here either.
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


class _Conv2d(nn.Conv2d):
    """A convolution that may leave its bias to a pool."""

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias if biased else None)


class CNN_SP(nn.Module):  # noqa: N801  the paper's name
    """Classify 256 × 256 RGB images.

    The pools have no state, so a state dict fits whatever ``pooling`` is.

    Args:
        num_classes: number of classes, at least 1.
        pooling: ``"stochastic"`` (draws in training, expectation in evaluation), ``"max"`` or
            ``"avg"``.
        dropout: probability of dropping one of fc1's outputs in training.

    Shape:
        input ``[N, 3, 256, 256]``, floating point, contiguous or channels_last;
        output ``[N, num_classes]``, log-probabilities (:func:`torch.nn.functional.nll_loss`).

    Raises:
        ValueError: for an unknown ``pooling``, or an input of another shape.
    """

    def __init__(
        self, num_classes: int = 3, pooling: str = "stochastic", dropout: float = 0.1
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.pooling = pooling
        self.conv1 = _Conv2d(3, 40, 3, stride=3, padding=1)  # [N, 40, 86, 86]
        self.conv2 = _Conv2d(40, 80, 5, stride=3)  # [N, 80, 28, 28]
        self.conv3 = _Conv2d(80, 120, 3, stride=3, padding=1)  # [N, 120, 10, 10]
        self.conv4 = _Conv2d(120, 120, 3, padding=1)
        self.conv5 = _Conv2d(120, 120, 3, padding=1)
        self.pool = _make_pool(pooling)
        self.fc1 = nn.Linear(120 * 10 * 10, 100)
        self.fc2 = nn.Linear(100, num_classes)
        self.dropout = nn.Dropout(dropout)

    def _block(self, x: Tensor, conv: nn.Module) -> Tensor:
        """Convolution, bias, ReLU, pool."""
        if isinstance(self.pool, StochasticPool2d) and isinstance(conv, _Conv2d):
            # The pool adds the bias and rectifies: two passes over memory fewer.
            return self.pool(conv(x, biased=False), bias=conv.bias)
        return self.pool(F.relu(conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"CNN_SP takes [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}] images, because fc1 needs "
                f"{self.fc1.in_features} features; got {list(x.shape)}"
            )
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            x = self._block(x, conv)
        x = self.dropout(F.relu(self.fc1(torch.flatten(x, 1))))
        # On a CPU autocast would take the logarithm in 16 bits, of which a third of an untrained
        # network's are alike.
        return F.log_softmax(self.fc2(x).to(self.conv1.weight.dtype), dim=1)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, pooling={self.pooling!r}"
