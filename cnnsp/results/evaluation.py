"""How well a network recognises images: loss, accuracy, confusion matrix, sensitivities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import ImageBank
from ..training.devices import autocast


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network says about labelled images; :meth:`of` makes one.

    Attributes:
        loss: mean negative log-likelihood.
        confusion: int64 ``[C, C]``; in row t and column p the number of images of class t that
            were taken for class p.
        log_probs: float32 ``[N, C]``, on the CPU.
        labels: int64 ``[N]``, on the CPU.
    """

    loss: float
    confusion: Tensor
    log_probs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, labels: Tensor) -> Evaluation:
        """From log-probabilities ``[N, C]`` and labels ``[N]`` of at least one image."""
        log_probs, labels = log_probs.float().cpu(), labels.cpu()
        classes = log_probs.shape[1]
        cells = labels * classes + log_probs.argmax(1)
        confusion = torch.bincount(cells, minlength=classes**2).view(classes, classes)
        return cls(float(_losses(log_probs, labels).mean()), confusion, log_probs, labels)

    @property
    def correct(self) -> int:
        """Number of images that were recognised."""
        return int(self.confusion.trace())

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """In per cent."""
        return 100 * self.correct / self.total

    @property
    def sensitivities(self) -> tuple[float, ...]:
        """Of each class, the share of its images that were recognised, in per cent.

        NaN for a class without images.
        """
        right, images = self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist()
        return tuple(100 * r / n if n else math.nan for r, n in zip(right, images, strict=True))

    def most_wrong(self, k: int) -> Tensor:
        """The ``k`` images with the highest loss among those not recognised, worst first.

        Returns positions, int64 ``[k]``; fewer when fewer are wrong.
        """
        wrong = (self.log_probs.argmax(1) != self.labels).nonzero().squeeze(1)
        losses = _losses(self.log_probs[wrong], self.labels[wrong])
        return wrong[losses.argsort(descending=True, stable=True)[:k]]


def _losses(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Float64 ``[N]``."""
    return -log_probs.gather(1, labels[:, None]).squeeze(1).double()


def log_probabilities(
    model: nn.Module,
    bank: ImageBank,
    items: Tensor,
    batch_size: int,
    amp_dtype: torch.dtype | None = None,
) -> Tensor:
    """What ``model`` says in evaluation mode about ``items`` of ``bank``.

    Args:
        model: gives log-probabilities ``[B, C]``; its mode is restored.
        bank: the images.
        items: int64 ``[N]``, on the CPU.
        batch_size: images in a forward pass.
        amp_dtype: autocast type, or None for fp32.

    Returns:
        float32 ``[N, C]``, on the CPU. The host waits for the device once, at the end.
    """
    training = model.training
    model.eval()
    outputs = []
    with torch.no_grad():
        for _, images, _ in bank.batches(items.split(batch_size), reuse=True):
            with autocast(bank.device, amp_dtype):
                outputs.append(model(images).float())
    model.train(training)
    return torch.cat(outputs).cpu()


def evaluate(
    model: nn.Module, bank: ImageBank, batch_size: int, amp_dtype: torch.dtype | None = None
) -> Evaluation:
    """Evaluate ``model``, in evaluation mode, on all items of ``bank``."""
    log_probs = log_probabilities(model, bank, torch.arange(len(bank)), batch_size, amp_dtype)
    return Evaluation.of(log_probs, bank.labels.repeat_interleave(bank.repeats))


def confusion_rows(evaluation: Evaluation, classes: Sequence[str]) -> list[list[str]]:
    """The confusion matrix and the sensitivities as the cells of a table, header first."""
    rows = [["true \\ predicted", *classes, "images", "sensitivity"]]
    counts = evaluation.confusion.tolist()
    for name, row, share in zip(classes, counts, evaluation.sensitivities, strict=True):
        percent = "none" if math.isnan(share) else f"{share:.2f} %"
        rows.append([name, *map(str, row), str(sum(row)), percent])
    return rows
