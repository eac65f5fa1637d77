"""The training loop: epochs, evaluation, checkpoints, and going on from one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, report
from .augment import ImageBank, epoch_batches
from .errors import UserError
from .network import CNN_SP


@dataclass(frozen=True)
class TrainOptions:
    """What a run is made of. The defaults are the recipe of the flower replication.

    Attributes:
        data_dir: folder of the photographs, or ``"synthetic"``; only recorded here.
        pool: pooling of :class:`CNN_SP`.
        epochs: epochs in all, those before a resumed checkpoint included.
        batch_size: images in an optimiser step.
        opt: ``"sgd"`` or ``"adam"``.
        lr: learning rate of the first ``lr_step`` epochs.
        momentum: of SGD.
        weight_decay: L2 penalty.
        lr_step: epochs after which the learning rate is divided by 10, again and again.
        amp_dtype: autocast type, or None for plain fp32.
        channels_last: memory format of images and weights.
        torchcompile: whether to compile the network.
        seed: of the weights, the order of the images, dropout and the stochastic pools.
        max_steps: optimiser steps after which to evaluate and stop, or None.
        log_interval: optimiser steps between two reports of the loss.
    """

    data_dir: str = "synthetic"
    pool: str = "stochastic"
    epochs: int = 30
    batch_size: int = 256
    opt: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_step: int = 10
    amp_dtype: str | None = None
    channels_last: bool = False
    torchcompile: bool = False
    seed: int = 0
    max_steps: int | None = None
    log_interval: int = 10


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: the epoch under way, from 0.
        step: optimiser steps done in that epoch.
        loss_sum: training loss summed over the images of those steps.
        images: their number.
        total_steps: optimiser steps since the run began.
        best_accuracy: best test accuracy so far, in per cent; -1 before the first evaluation.
        history: one result per evaluated epoch.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    total_steps: int = 0
    best_accuracy: float = -1.0
    history: list[report.EpochResult] = field(default_factory=list)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Progress:
        history = [report.EpochResult(**row) for row in state["history"]]
        return cls(**{**state, "history": history})


@dataclass(frozen=True)
class Evaluation:
    """Mean loss, and how many of ``total`` images were recognised."""

    loss: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """In per cent."""
        return 100 * self.correct / self.total


def evaluate(
    model: nn.Module, bank: ImageBank, batch_size: int, amp_dtype: torch.dtype | None = None
) -> Evaluation:
    """Loss and accuracy of ``model``, in evaluation mode, over all items of ``bank``."""
    training = model.training
    model.eval()
    loss = torch.zeros((), device=bank.device)
    correct = torch.zeros((), dtype=torch.int64, device=bank.device)
    with torch.no_grad():
        for items in torch.arange(len(bank)).split(batch_size):
            images, labels = bank.batch(items)
            with _autocast(bank.device, amp_dtype):
                output = model(images)
            loss += F.nll_loss(output.float(), labels, reduction="sum")
            correct += (output.argmax(1) == labels).sum()
    model.train(training)
    return Evaluation(float(loss) / len(bank), int(correct), len(bank))


def check_output(folder: Path, *, resuming: bool = False) -> None:
    """Check that a run can be written to ``folder``, without creating anything.

    Raises:
        UserError: when it is no folder, is not writable, or holds another run.
    """
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"output folder {folder}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output folder {folder}: {parent} is not writable")
    if not resuming and (folder / "last.pt").exists():
        raise UserError(
            f"output folder {folder} holds another run; choose another, or go on with it: "
            f"--resume {folder / 'last.pt'}"
        )


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class Trainer:
    """Trains one CNN_SP and writes what it learns to a folder.

    Args:
        options: the recipe.
        train: training images in all their variants.
        test: test images; on the same device.
        classes: names of the classes.
        output: folder for checkpoints, ``args.json``, ``summary.csv``, ``curves.png`` and
            TensorBoard's events; :meth:`run` creates it.
    """

    def __init__(
        self,
        options: TrainOptions,
        train: ImageBank,
        test: ImageBank,
        classes: tuple[str, ...],
        output: Path,
    ) -> None:
        self.options, self.train, self.test = options, train, test
        self.classes, self.output = classes, output
        self.device = train.device
        self.amp_dtype = getattr(torch, options.amp_dtype) if options.amp_dtype else None

        torch.manual_seed(options.seed)
        model = CNN_SP(len(classes), options.pool).to(self.device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self.forward: nn.Module = (
            cast(nn.Module, torch.compile(model)) if options.torchcompile else model
        )
        self.optimizer = _make_optimizer(model.parameters(), options, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )
        self.progress = Progress()

    def run(self) -> Progress:
        """Train to the last epoch, or for ``max_steps``; returns where that ended.

        Raises:
            UserError: when the output folder cannot be written, or the loss is not finite.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(self.options), indent=2)
            (self.output / "args.json").write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.output}: {error.strerror}") from None
        board = report.Board(self.output, first_step=self.progress.total_steps)
        try:
            steps_left = self.options.max_steps
            while self.progress.epoch < self.options.epochs and steps_left != 0:
                before = self.progress.total_steps
                self._epoch(board, steps_left)
                if steps_left is not None:
                    steps_left -= self.progress.total_steps - before
        finally:
            board.close()
        return self.progress

    def _epoch(self, board: report.Board, steps_left: int | None) -> None:
        """Train one epoch, or what is left of it, evaluate, and write everything."""
        options, progress = self.options, self.progress
        steps = math.ceil(len(self.train) / options.batch_size)
        lr = options.lr * 0.1 ** (progress.epoch // options.lr_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        start = time.perf_counter()
        images = self._train_steps(board, steps, steps_left)
        images_per_second = images / (time.perf_counter() - start)
        train_loss = progress.loss_sum / progress.images
        if not math.isfinite(train_loss):
            raise UserError(
                f"the training loss became {train_loss} in epoch {progress.epoch + 1}; "
                "a lower --lr may help"
            )
        test = evaluate(self.forward, self.test, options.batch_size, self.amp_dtype)

        result = report.EpochResult(
            progress.epoch + 1,
            train_loss,
            test.loss,
            test.accuracy,
            lr,
            images_per_second,
            time.perf_counter() - start,
        )
        progress.history = [r for r in progress.history if r.epoch != result.epoch] + [result]
        if progress.step == steps:
            progress.epoch += 1
            progress.step = progress.images = 0
            progress.loss_sum = 0.0
        is_best = test.accuracy > progress.best_accuracy
        progress.best_accuracy = max(progress.best_accuracy, test.accuracy)

        state = self._state()
        checkpoint.save(state, self.output / "last.pt")
        if is_best:
            checkpoint.save(state, self.output / "best.pt")
        report.write_summary(progress.history, self.output / "summary.csv")
        title = f"CNN_SP, {options.pool} pooling, {options.data_dir}"
        report.draw_curves(progress.history, self.output / "curves.png", title)
        board.epoch(result, progress.total_steps)
        print(
            f"Epoch {result.epoch}/{options.epochs}: train loss {train_loss:.4f}, lr {lr:g}, "
            f"{images_per_second:.0f} images/s, {result.seconds:.0f} s\n"
            f"Test set: average loss {test.loss:.4f}, "
            f"accuracy {test.correct}/{test.total} ({test.accuracy:.2f}%)",
            flush=True,
        )

    def _train_steps(self, board: report.Board, steps: int, steps_left: int | None) -> int:
        """Optimiser steps to the end of the epoch, ``steps_left`` at most; images trained on."""
        options, progress = self.options, self.progress
        self.forward.train()
        # Summed on the device: reading it would make the host wait for every step.
        loss_sum = torch.tensor(progress.loss_sum, device=self.device)
        before = progress.images
        batches = epoch_batches(
            len(self.train),
            options.batch_size,
            seed=options.seed,
            epoch=progress.epoch,
            first=progress.step,
        )
        name = f"epoch {progress.epoch + 1}/{options.epochs}"
        with report.EpochProgress(name, steps, progress.step) as bar:
            for items in batches:
                images, labels = self.train.batch(items)
                if progress.total_steps == 0:
                    board.first_batch(images)
                loss = self._step(images, labels)
                loss_sum += loss * len(items)
                progress.step += 1
                progress.total_steps += 1
                progress.images += len(items)
                bar.advance(len(items))
                if progress.step % options.log_interval == 0 or progress.step == steps:
                    value = float(loss)
                    bar.report(value)
                    board.train_loss(value, progress.total_steps)
                if steps_left is not None:
                    steps_left -= 1
                    if steps_left == 0:
                        break
        progress.loss_sum = float(loss_sum)
        return progress.images - before

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step; the mean loss of its batch, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(self.device, self.amp_dtype):
            output = self.forward(images)
        loss = F.nll_loss(output.float(), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "format": checkpoint.FORMAT,
            "model": self.model.state_dict(),
            "pooling": self.options.pool,
            "classes": list(self.classes),
            "options": asdict(self.options),
            "progress": asdict(self.progress),
            "items": len(self.train),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
        }

    def restore(self, state: dict[str, Any], path: str | Path) -> None:
        """Go on from ``state``, which :func:`cnnsp.checkpoint.load` read from ``path``.

        Settings that the options give anew, such as the learning rate, hold from here on.

        Raises:
            UserError: when the state does not fit the options or the data, or is already at the
                last epoch.
        """
        before, options = TrainOptions(**state["options"]), self.options
        progress = Progress.from_dict(state["progress"])
        if before.opt != options.opt:
            raise UserError(f"checkpoint {path} was trained with --opt {before.opt}")
        if progress.epoch >= options.epochs:
            raise UserError(
                f"checkpoint {path} has finished {progress.epoch} of {options.epochs} epochs; "
                "a larger --epochs goes on"
            )
        # Within an epoch, the number of steps says which images are left only if these agree.
        here = (options.batch_size, options.seed, len(self.train))
        if progress.step > 0 and here != (before.batch_size, before.seed, state["items"]):
            raise UserError(
                f"checkpoint {path} stopped within an epoch: it goes on only with the same images, "
                f"--batch-size {before.batch_size} and --seed {before.seed}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["random"]:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {path} does not fit: {str(error).splitlines()[0]}"
            ) from None
        for group in self.optimizer.param_groups:
            group["weight_decay"] = options.weight_decay
            if "momentum" in group:
                group["momentum"] = options.momentum
        self.progress = progress


def _make_optimizer(
    parameters: Iterable[nn.Parameter], options: TrainOptions, device: torch.device
) -> torch.optim.Optimizer:
    # A fused optimiser takes the scaler's verdict on the device: no host synchronisation.
    fused = device.type == "cuda"
    lr, weight_decay = options.lr, options.weight_decay
    if options.opt == "sgd":
        return torch.optim.SGD(
            parameters, lr, options.momentum, weight_decay=weight_decay, fused=fused
        )
    if options.opt == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=fused)
    raise ValueError(f"opt must be sgd or adam, got {options.opt!r}")
