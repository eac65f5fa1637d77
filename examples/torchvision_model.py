"""Make a network of torchvision's stochastic, train it for a few steps and average its draws.

    python examples/torchvision_model.py

needs torchvision beside `stochastic_pooling`. The images are noise with one strong colour,
which is the class, so that the loss falls within seconds on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision

from stochastic_pooling import average_draws, fuse, replace_pooling


def images_and_classes(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(count, 3, size, size)` noise in fp32, and which colour is strong in each: 0, 1 or 2."""
    classes = torch.arange(count) % 3
    images = torch.randn(count, 3, size, size)
    images[torch.arange(count), classes] += 2
    return images, classes


def main(steps: int = 20) -> list[float]:
    """Train; return the loss of each step."""
    torch.manual_seed(0)
    model: torch.nn.Module = torchvision.models.squeezenet1_1(num_classes=3)
    model = replace_pooling(model)  # every max and average pool, in place
    model = fuse(model)  # the ReLUs and biases before a pool become part of it
    print("folded into the pools:", *model.meta["folded"], sep="\n  ")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    images, classes = images_and_classes(15, 64)
    losses = []
    model.train()  # the pools draw
    for _ in range(steps):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")

    model.eval()  # the pools give the expectation, and no draw is left
    images, classes = images_and_classes(6, 64)
    with torch.no_grad():
        expected = model(images).softmax(1)
    # Here they draw again, 20 times: the spread says how much an answer depends on the draw.
    mean, std = average_draws(model, images, draws=20, transform=lambda y: y.softmax(1))
    print("class   by expectation   by 20 draws")
    for number, one, average, spread in zip(classes.tolist(), expected, mean, std, strict=True):
        print(f"{number:5}   {one[number]:14.3f}   {average[number]:.3f} ± {spread[number]:.3f}")
    return losses


if __name__ == "__main__":
    main()
