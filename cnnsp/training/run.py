"""A run: its epochs and evaluations, what it writes, and how it stops and goes on."""

from __future__ import annotations

import errno
import math
import operator
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from .. import files
from ..cli import patience
from ..data.batches import ImageBank, epoch_batches
from ..data.images import digest
from ..errors import UserError, quoted
from ..interruption import Asked, Interrupted, Requests
from ..results import board as boards
from ..results import pictures
from ..results.evaluation import Evaluation, evaluate
from ..results.history import EpochResult, write_summary
from . import checkpoint
from .processes import Team
from .recipe import TrainOptions, learning_rate
from .step import Learner

_T = TypeVar("_T")


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # the one under way, from 0
    step: int = 0  # optimiser steps done in that epoch
    loss_sum: float = 0.0  # training loss summed over the images of those steps
    images: int = 0  # their number
    total_steps: int = 0  # optimiser steps since the run began
    # Of best.pt: of the test images, in per cent; -1 before there is one. It may have been stopped
    # within an epoch, of which the history keeps only the end.
    best_accuracy: float = -1.0
    best_epoch: float = 0.0
    history: list[EpochResult] = field(default_factory=list)  # one for each evaluated epoch


# The signal of a pipe that nobody reads, which Windows does not have.
_PIPE = 13
_DRAWING_INTERVAL = 10.0  # seconds; drawing takes one, in which a GPU may train an epoch
_COMPILING = "the first step takes longest; to compile kernels, up to a minute, once on a machine …"


class Trainer:
    """Trains one CNN_SP on ``train``, evaluates it on ``test``, and writes to a folder, ``output``.

    That is there, and gets checkpoints, ``summary.csv``, pictures and TensorBoard's events. Of a
    ``team`` of processes each has a trainer of its own.
    """

    def __init__(
        self,
        options: TrainOptions,
        train: ImageBank,
        test: ImageBank,
        output: Path,
        team: Team | None = None,
    ) -> None:
        self.options, self.train, self.test = options, train, test
        self.classes, self.output, self.device = train.images.classes, output, train.device
        self.team = team or Team()
        self.learner = Learner(options, len(self.classes), self.device, self.team)
        self.progress = Progress()
        self.steps = math.ceil(len(train) / options.batch_size)  # of an epoch
        self._digests = [digest(bank.images) for bank in (train, test)]
        self._losses: list[tuple[Tensor, int]] = []  # of steps since they were added up
        self._warm = False
        self._saved_at = time.monotonic()
        self._draw_at = -math.inf

    def run(self) -> None:
        """Train to the last epoch, or for ``max_steps``.

        Raises:
            UserError: when the output folder cannot be written, or the loss is not finite.
            Interrupted: on Ctrl-C, SIGTERM or SIGHUP, after a checkpoint.
        """
        board, progress, most = None, self.progress, self.options.max_steps
        self._last = math.inf if most is None else progress.total_steps + most
        try:
            if self.team.leads:
                board = boards.Board(self.output, first_step=progress.total_steps)
            with Requests("a checkpoint is written as soon as the step is done") as self._requests:
                while progress.epoch < self.options.epochs and progress.total_steps < self._last:
                    self._epoch(board)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # of a pipe, and of a terminal
                self._stop(_PIPE, "nobody reads the output any more")
            raise UserError(f"cannot write to {self.output}: {error.strerror or error}") from None
        finally:
            if board is not None:
                board.close()

    def _epoch(self, board: boards.Board | None) -> None:
        """Train one epoch, or what is left of it, evaluate, and write everything."""
        progress = self.progress
        start, before = time.perf_counter(), progress.images
        lr = self._train_steps(board)
        # None were trained where an interrupted run had done the last step already.
        images_per_second = (progress.images - before) / (time.perf_counter() - start) or math.nan
        test = self._at_once(self.evaluate)

        whole = progress.step == self.steps
        result = EpochResult(
            progress.epoch + (1 if whole else progress.step / self.steps),
            progress.loss_sum / progress.images,
            test.loss,
            test.accuracy,
            lr,
            images_per_second,
            time.perf_counter() - start,
        )
        progress.history = [r for r in progress.history if r.epoch <= progress.epoch] + [result]
        if whole:
            progress.epoch += 1
            progress.step = progress.images = 0
            progress.loss_sum = 0.0
        if is_best := test.accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = test.accuracy, result.epoch
        if board is not None:
            # Before the checkpoint: a run that is killed in between does the epoch again.
            _try_to_write(write_summary, progress.history, self.output / "summary.csv")
        self._save(also_best=is_best)
        if board is not None:
            self._report(board, result, test)

    def _train_steps(self, board: boards.Board | None) -> float:
        """Optimiser steps to the end of the epoch or of the run; the last one's learning rate."""
        options, progress, team = self.options, self.progress, self.team
        batches = epoch_batches(
            len(self.train),
            options.batch_size,
            seed=options.seed,
            epoch=progress.epoch,
            first=progress.step,
            rank=team.rank,
            world_size=team.size,
        )
        made = self.train.batches(batches, progress.epoch, reuse=True)
        # Where an interrupted run had done the last step already, there is nothing left to train.
        lr = learning_rate(options, progress.epoch, max(progress.step - 1, 0), self.steps)
        rest = min(options.epochs * self.steps, self._last) - progress.total_steps
        name = f"epoch {progress.epoch + 1}/{options.epochs}"
        with boards.EpochProgress(name, self.steps, progress.step, int(rest)) as bar:
            while progress.step < self.steps and progress.total_steps < self._last:
                with nullcontext() if self._warm else patience(_COMPILING):
                    _, images, labels = self._at_once(lambda: next(made))
                    if board is not None and progress.total_steps == 0:
                        board.first_batch(images)
                        board.graph(self.learner.model, images[:1])
                    lr = learning_rate(options, progress.epoch, progress.step, self.steps)
                    left = len(self.train) - progress.step * options.batch_size
                    size = min(options.batch_size, left)
                    loss = self.learner.step(
                        images, labels, batch_size=size, number=progress.total_steps, lr=lr
                    )
                self._warm = True
                self._losses.append((loss, size))
                progress.step += 1
                progress.total_steps += 1
                progress.images += size
                bar.advance(size)
                ends = progress.step == self.steps or progress.total_steps == self._last
                if progress.step % options.log_interval == 0 or ends:
                    value = self._take_losses()
                    bar.report(value)
                    if board is not None:
                        board.train_loss(value, progress.total_steps)
                self._do_what_is_due()
        self._check()
        return lr

    def _take_losses(self) -> float:
        """Wait for the steps since the last call and add up their losses; the last of these."""
        if not self._losses:
            return math.nan
        losses, sizes = zip(*self._losses, strict=True)
        values = torch.stack(losses).tolist()
        for step, value in enumerate(values, start=self.progress.total_steps - len(values)):
            if not math.isfinite(value):
                raise self._lost("training loss was", step)
        self.progress.loss_sum += sum(map(operator.mul, values, sizes))
        self._losses.clear()
        return values[-1]

    def _check(self) -> None:
        """Raise UserError, rather than save weights that are lost."""
        self._take_losses()
        if not self.learner.is_finite():
            raise self._lost("weights were", self.progress.total_steps - 1)

    def _lost(self, what: str, step: int) -> UserError:
        kept = self.output / "last.pt"
        back = f"; {kept} is from before it" if kept.exists() else ""
        return UserError(
            f"the {what} not finite in epoch {self.progress.epoch + 1}, at step {step + 1} of the "
            f"run; a lower --lr may help, or --warmup-epochs{back}"
        )

    def _do_what_is_due(self) -> None:
        """Save within the epoch, and stop there if a signal asks for it."""
        due = time.monotonic() - self._saved_at > self.options.checkpoint_interval
        # Signals and clocks need not come to every process at the same step.
        wish = self.team.highest(2 * (self._requests.signal or 0) + due)
        if wish == 1:
            self._check()
            self._save()
        elif wish:
            self._stop(wish // 2)

    def _at_once(self, work: Callable[[], _T]) -> _T:
        """Do what leaves no trace until it is done, so that a signal need not wait for it.

        With several processes it does, for they stop at the same step.
        """
        if self.team.size > 1:
            return work()
        try:
            with self._requests.at_once():
                return work()
        except Asked:
            assert self._requests.signal is not None
            self._stop(self._requests.signal)

    def _stop(self, wish: int, why: str | None = None) -> NoReturn:
        self._check()
        self._save()
        last = quoted(self.output / "last.pt")
        raise Interrupted(
            wish,
            f"{why or signal.Signals(wish).name}: stopped in epoch {self.progress.epoch + 1} after "
            f"step {self.progress.step}; --resume {last} goes on from there",
        )

    def evaluate(self) -> Evaluation:
        """The network on the test images, each process taking its share."""
        learner, parts = self.learner, self.options.accumulate
        batch_size = math.ceil(self.options.batch_size / parts / self.team.size)
        return evaluate(learner.network, self.test, batch_size, learner.amp_dtype, self.team)

    def _report(self, board: boards.Board, result: EpochResult, test: Evaluation) -> None:
        """Show an epoch's results in the folder, in TensorBoard and on the terminal."""
        progress, options = self.progress, self.options
        title = f"CNN_SP, {options.pool} pooling"
        ends = progress.epoch == options.epochs or progress.total_steps == self._last
        if (start := time.monotonic()) > self._draw_at or ends:
            curves = pictures.curves(progress.history, title)
            _try_to_write(pictures.write, curves, self.output / "curves.png")
            when = f"{title}, epoch {result.epoch:.4g}"
            confusion = pictures.confusion(test, self.classes, when)
            _try_to_write(pictures.write, confusion, self.output / "confusion.png")
            board.evaluation(confusion, test, self.test, progress.total_steps)
            end = time.monotonic()  # of hundreds of classes a drawing takes many seconds
            self._draw_at = end + max(_DRAWING_INTERVAL, 20 * (end - start))
        cuda = self.device.type == "cuda"
        memory_mib = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else None
        board.epoch(result, progress.total_steps, memory_mib)
        if progress.epoch == options.epochs:
            board.hyper_parameters(
                asdict(options),
                {
                    "last_accuracy": result.test_accuracy,
                    "last_loss": result.test_loss,
                    "lowest_loss": min(row.test_loss for row in progress.history),
                },
            )
        name = f"Epoch {math.ceil(result.epoch)}/{options.epochs}"
        if progress.step:
            name += f", only its first {progress.step} of {self.steps} steps (--max-steps)"
        images = "Test set" if options.validate is None else "Held-out images"
        speed = f"{result.images_per_second:.0f} images/s, " if result.images_per_second > 0 else ""
        print(
            f"{name}: train loss {result.train_loss:.4f}, "
            f"lr {result.lr:.3g}, {speed}{result.seconds:.0f} s\n"
            f"{images}: average loss {test.loss:.4f}, "
            f"accuracy {test.correct}/{test.total} ({test.accuracy:.2f}%)",
            flush=True,
        )

    def verdict(self) -> str:
        """One line on how it went and where everything is."""
        progress = self.progress
        images = "test" if self.options.validate is None else "held-out"
        return (
            f"Best {images} accuracy {progress.best_accuracy:.2f} % after epoch "
            f"{progress.best_epoch:.4g}, last {progress.history[-1].test_accuracy:.2f} %; "
            f"all of it is in {self.output}"
        )

    def _save(self, *, also_best: bool = False) -> None:
        self._saved_at = time.monotonic()
        if not self.team.leads:
            return
        state = {
            "format": checkpoint.FORMAT,
            "pooling": self.options.pool,
            "classes": list(self.classes),
            "options": asdict(self.options),
            "progress": asdict(self.progress),
            "items": len(self.train),
            "digests": self._digests,
            **self.learner.state(),
        }
        # In this order, for a run that is killed in between does the epoch again.
        if also_best:
            checkpoint.save(state, self.output / "best.pt")
        checkpoint.save(state, self.output / "last.pt")

    def restore(self, state: dict[str, Any], path: str | Path) -> None:
        """Go on from ``state``, which :func:`cnnsp.training.checkpoint.load` read from ``path``.

        Settings that the options give anew, such as the learning rate, hold from here on. The
        number of processes may be another one.

        Raises:
            UserError: when the state does not fit the options or the data, or is already at the
                last epoch.
        """
        try:
            before = TrainOptions(**state["options"])
            progress = Progress(**state["progress"])
            progress.history = [EpochResult(**row) for row in state["progress"]["history"]]
        except (KeyError, TypeError):
            raise UserError(f"checkpoint {path} was written by another version") from None
        options = self.options
        if progress.epoch >= options.epochs:
            raise UserError(
                f"checkpoint {path} has finished {progress.epoch} of {options.epochs} epochs; "
                "a larger --epochs goes on"
            )
        # Within an epoch, the number of steps says which images are left only if these agree.
        digests = state.get("digests", self._digests)  # older checkpoints have none
        here = (options.augment, options.batch_size, options.seed, len(self.train))
        there = (before.augment, before.batch_size, before.seed, state["items"])
        if progress.step > 0 and (here != there or digests[0] != self._digests[0]):
            raise UserError(
                f"checkpoint {path} stopped within an epoch: it goes on only with the same images, "
                f"--augment {before.augment}, --batch-size {before.batch_size} and "
                f"--seed {before.seed}"
            )
        try:
            self.learner.load(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"checkpoint {path} does not fit: {reason}") from None
        self.progress = progress
        self._tell_changes(before, state["items"])
        if digests[1] != self._digests[1]:
            progress.best_accuracy = -1.0
            print("Other test images than before, by their names: best.pt is chosen anew.")
            if options.validate not in (None, before.validate):
                print("warning: it may have learned from these held-out images", file=sys.stderr)
        # For a run that goes on in another folder, so that all of it is there.
        best = Path(path).with_name("best.pt")
        if self.team.leads and best.is_file() and not (self.output / best.name).exists():
            files.write(self.output / best.name, best.read_bytes())

    def _tell_changes(self, before: TrainOptions, items: int) -> None:
        """Say what goes on otherwise than it began."""
        old, new = asdict(before), asdict(self.options)
        changed = [
            f"--{name.replace('_', '-')} {value} ({old[name]})"
            for name, value in new.items()
            if name != "max_steps" and value != old[name]
        ]
        if items != len(self.train):
            changed.append(f"{len(self.train)} images an epoch ({items})")
        if changed:
            print(f"Other settings than before (in brackets): {', '.join(changed)}")
        here = self.progress.epoch, self.progress.step
        there = min(here, (before.epochs - 1, self.steps - 1))
        rate = learning_rate(self.options, *here, self.steps)
        expected = learning_rate(before, *there, self.steps)
        if not math.isclose(rate, expected):
            print(f"The learning rate goes on at {rate:.3g}; it would have been {expected:.3g}.")


def _try_to_write(write: Callable[[Any, Path], None], content: Any, path: Path) -> None:
    """Write what a later epoch writes anew: on Windows, a spreadsheet locks what it shows."""
    try:
        write(content, path)
    except UserError as error:
        print(f"warning: {error}; the run goes on without it", file=sys.stderr)
