"""Train a block with mixed precision: fp16 and a gradient scaler on a GPU, bf16 on a CPU.

    python examples/amp.py

The pool adds the convolution's bias and rectifies, so `conv → bias → ReLU → pool` is a convolution
without its bias and a pool. Under autocast the activations are of 16 bits and the bias stays the
fp32 parameter that it is: the pool takes both, sums in fp32, and answers in the activations' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from stochastic_pooling import StochasticPool2d


class Block(nn.Module):
    """`(N, inputs, H, W)` to `(N, outputs, H / 2, W / 2)`: convolution, bias, ReLU and pool."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.pool = StochasticPool2d(3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.conv.weight, None, self.conv.stride, self.conv.padding)
        return self.pool(x, bias=self.conv.bias)


def main(steps: int = 20) -> list[float]:
    """Train; return the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    model = nn.Sequential(Block(3, 16), Block(16, 32), nn.Flatten(), nn.Linear(32 * 8 * 8, 4))
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # Small gradients vanish in fp16; bf16 has the exponents of fp32 and needs no scaling.
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    classes = torch.arange(16, device=device) % 4
    images = torch.randn(16, 3, 32, 32, device=device) + classes.view(-1, 1, 1, 1)

    losses = []
    for _ in range(steps):
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # leaves a step out whose gradients overflowed
        scaler.update()
        losses.append(loss.item())

    with torch.autocast(device, dtype):
        pooled = model[0](images)
    bias = model[0].conv.bias
    print(f"on {device}: pooled {pooled.dtype}, bias {bias.dtype}, its gradient {bias.grad.dtype}")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
    assert pooled.dtype == dtype
    return losses


if __name__ == "__main__":
    main()
