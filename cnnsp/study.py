"""A study: train.py for recipes, pools and seeds, and the table and the figure of what came out."""

from __future__ import annotations

import csv
import json
import math
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import checkpoint, figures, report
from .augment import ImageBank
from .data import load_folder
from .errors import UserError
from .evaluation import evaluate
from .inference import load_network
from .interruption import Interrupted, Requests
from .network import POOLINGS
from .recipe import RECIPES, TrainOptions
from .report import EpochResult
from .training import Progress

# Flags of train.py that the study itself gives.
OWN_FLAGS = (
    "--recipe",
    "--pool",
    "--seed",
    "--data-dir",
    "--output-dir",
    "--device",
    "--resume",
)
# Colours that the colour-blind can tell apart (Okabe and Ito).
_COLOURS = {"stochastic": "#D55E00", "max": "#0072B2", "avg": "#009E73"}
_BATCH = 64

History = Sequence[EpochResult]


class Case(NamedTuple):
    """One run of a study; as text, the name of its folder."""

    recipe: str
    pool: str
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe}-{self.pool}-{self.seed}"


def cases(recipes: Sequence[str], pools: Sequence[str], seeds: int) -> list[Case]:
    """Seed by seed, so that a study that is interrupted can compare what it has."""
    return [Case(r, p, s) for s in range(seeds) for r in recipes for p in pools]


@dataclass(frozen=True)
class Result:
    """What came out of one run; ``result.json`` in its folder.

    Accuracies and sensitivities are in per cent.

    Attributes:
        recipe, pool, seed: what was run.
        flags: the other flags of train.py.
        epochs: epochs trained.
        train_images, test_images: their numbers, without augmentation.
        accuracy, loss: of the test images after the last epoch, as train.py computed them.
        best_accuracy: highest test accuracy of an epoch.
        lowest_loss: lowest test loss of an epoch.
        sensitivities: of each class, the share of its test images that were recognised.
        train_accuracy, train_loss: of the training images as they are, not augmented.
        seconds: training and evaluation; of an epoch that was interrupted, only since then.
        machine: what it ran on; for a run that went on elsewhere, where it ended.
        torch_version: of PyTorch.
        threads: of PyTorch on the CPU.
        date: on which it was finished, year-month-day.
    """

    recipe: str
    pool: str
    seed: int
    flags: list[str]
    epochs: int
    train_images: int
    test_images: int
    accuracy: float
    loss: float
    best_accuracy: float
    lowest_loss: float
    sensitivities: dict[str, float]
    train_accuracy: float
    train_loss: float
    seconds: float
    machine: str
    torch_version: str = str(torch.__version__)
    threads: int = field(default_factory=torch.get_num_threads)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    @property
    def gap(self) -> float:
        """Training accuracy minus test accuracy, in points."""
        return self.train_accuracy - self.accuracy

    @property
    def loss_ratio(self) -> float:
        """The last test loss over the lowest, NaN where that is 0."""
        return self.loss / self.lowest_loss if self.lowest_loss else math.nan

    @property
    def origin(self) -> str:
        """What it was computed with."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.machine}, torch {self.torch_version}, {threads}"

    def write(self, path: Path) -> None:
        """Write to ``path`` as JSON; raises UserError."""
        _write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what :meth:`write` wrote; raises UserError."""
        content = _read_json(path)
        try:
            return cls(**content)
        except TypeError:
            raise UserError(f"{path} is no result of study.py; delete it to make it anew") from None


def _write_json(path: Path, content: object) -> None:
    report.replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged; delete it to make it anew") from None


def evaluate_run(folder: Path, case: Case, flags: Sequence[str], machine: str) -> Result:
    """What came out of the run in ``folder``, by its ``last.pt``.

    The sensitivities and the figures of the training images are computed here, on the CPU and in
    fp32, so that no second process takes memory of the GPU.

    Args:
        folder: where train.py wrote.
        case, flags, machine: recorded.

    Raises:
        UserError: when the checkpoint or the images cannot be read.
    """
    path = folder / "last.pt"
    state = checkpoint.load(path)
    options, history = TrainOptions(**state["options"]), _history(state)
    train, test = load_folder(options.data_dir, validate=options.validate)
    network = load_network(path)
    checkpoint.check_classes(state, path, test.classes)
    model = network.model.to(memory_format=torch.channels_last)
    on_train, on_test = (
        evaluate(model, ImageBank(images, channels_last=True), _BATCH) for images in (train, test)
    )
    return Result(
        *case,
        flags=list(flags),
        epochs=history[-1].epoch,
        train_images=len(train),
        test_images=len(test),
        accuracy=history[-1].test_accuracy,
        loss=history[-1].test_loss,
        best_accuracy=max(row.test_accuracy for row in history),
        lowest_loss=min(row.test_loss for row in history),
        sensitivities=dict(zip(network.classes, on_test.sensitivities, strict=True)),
        train_accuracy=on_train.accuracy,
        train_loss=on_train.loss,
        seconds=sum(row.seconds for row in history),
        machine=machine,
    )


def _history(state: dict[str, Any]) -> list[EpochResult]:
    return Progress.from_dict(state["progress"]).history


def read_history(path: Path) -> list[EpochResult]:
    """The rows of a ``summary.csv``; raises UserError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [
            EpochResult(int(row.pop("epoch")), **{k: float(v) for k, v in row.items()})
            for row in rows
        ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no summary that train.py wrote") from None


def machine_name(device: torch.device) -> str:
    """The GPU's name; of a CPU, what PyTorch knows of its instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} ({cpu})"


@dataclass(frozen=True)
class Study:
    """The runs of train.py in one folder.

    Attributes:
        script: path of train.py.
        folder: of the study; each run has a folder in it.
        data_dir: folder of the photographs.
        flags: other flags of train.py, the same for all runs.
        device: ``--device`` of train.py, or None to leave the choice to it.
        machine: name of what the runs are made on, for the results.
        started_with: the command that started the study, for ``study.md``.
    """

    script: Path
    folder: Path
    data_dir: Path
    flags: Sequence[str]
    device: str | None
    machine: str
    started_with: str

    def check(self, planned: Iterable[Case]) -> None:
        """Check that the runs that the folder holds were started with the same flags.

        Raises:
            UserError: when one was not.
        """
        if not self.data_dir.is_dir():
            raise UserError(f"--data-dir {self.data_dir} is no folder; a study takes photographs")
        for flag in self.flags:
            if flag.split("=")[0] in OWN_FLAGS:
                raise UserError(f"{flag} is a flag that the study gives itself; leave it out")
        for path in sorted(self.folder.glob("*/flags.json")):
            theirs = _read_json(path)
            if theirs != self._recorded_flags():
                raise UserError(
                    f"{path.parent} was run with {shlex.join(map(str, theirs))}: "
                    "give the same after --, or another --output-dir"
                )
        for case in planned:
            folder = self.folder / str(case)
            if (folder / "last.pt").exists() and not (folder / "flags.json").exists():
                raise UserError(f"{folder} holds a run of something else: another --output-dir")

    def _recorded_flags(self) -> list[str]:
        return ["--data-dir", str(self.data_dir), *self.flags]

    def command(self, case: Case) -> list[str]:
        """The command that trains ``case``, or goes on with it."""
        folder = self.folder / str(case)
        command = [sys.executable, str(self.script), "--recipe", case.recipe, "--pool", case.pool]
        command += ["--seed", str(case.seed), "--data-dir", str(self.data_dir)]
        command += ["--output-dir", str(folder)]
        if self.device is not None:
            command += ["--device", self.device]
        command += self.flags
        if (folder / "last.pt").exists():
            command += ["--resume", str(folder / "last.pt")]
        return command

    def run(self, planned: Sequence[Case]) -> list[str]:
        """Run what is not finished; returns what failed, and how.

        Args:
            planned: the runs, in their order.

        Raises:
            UserError: when the study cannot be written.
            Interrupted: on Ctrl-C or SIGTERM, after the run has written its checkpoint.
        """
        failures = []
        with Requests() as requests:
            for number, case in enumerate(planned, start=1):
                folder, place = self.folder / str(case), f"[{number}/{len(planned)}]"
                _stop_if_asked(requests, f"{case}, run {number} of {len(planned)}")
                if (folder / "result.json").exists():
                    print(f"{place} {case} is finished", flush=True)
                    continue
                try:
                    status = 0 if _is_trained(folder) else self._train(case, place, requests)
                    _stop_if_asked(requests, f"{case}, run {number} of {len(planned)}")
                    if status != 0:
                        raise UserError(f"exit status {status}")
                    result = evaluate_run(folder, case, self.flags, self.machine)
                except UserError as error:
                    failures.append(f"{case} ({error})")
                    continue
                result.write(folder / "result.json")
                self.write()
                print(
                    f"{place} {case}: test accuracy {result.accuracy:.2f} %, "
                    f"training accuracy {result.train_accuracy:.2f} %",
                    flush=True,
                )
        self.write()
        return failures

    def _train(self, case: Case, place: str, requests: Requests) -> int:
        folder = self.folder / str(case)
        command = self.command(case)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
        _write_json(folder / "flags.json", self._recorded_flags())
        print(f"{place} {shlex.join(command)}", flush=True)
        return call(command, requests)

    def write(self) -> None:
        """Write ``results.json``, ``study.md`` and ``study.png`` of all finished runs.

        Raises:
            UserError: when one cannot be written, or a result cannot be read.
        """
        results = [Result.read(path) for path in self.folder.glob("*/result.json")]
        if not results:
            return
        results.sort(key=_place)
        histories = [
            read_history(self.folder / str(Case(r.recipe, r.pool, r.seed)) / "summary.csv")
            for r in results
        ]
        _write_json(self.folder / "results.json", [asdict(result) for result in results])
        text = document(results, self.started_with, self._recorded_flags())
        report.replace_file(self.folder / "study.md", text.encode())
        draw(results, histories, self.folder / "study.png")


def _is_trained(folder: Path) -> bool:
    """Whether an earlier study ended after the run and before its evaluation."""
    if not (folder / "last.pt").exists():
        return False
    state = checkpoint.load(folder / "last.pt")
    return bool(state["progress"]["epoch"] >= state["options"]["epochs"])


def _stop_if_asked(requests: Requests, where: str) -> None:
    if requests.signal is not None:
        name = signal.Signals(requests.signal).name
        raise Interrupted(
            requests.signal, f"{name}: stopped at {where}; the same command goes on from there"
        )


def call(command: Sequence[str], requests: Requests) -> int:
    """Run a command to its end and return its exit status.

    Ctrl-C comes to it from the terminal; SIGTERM is passed on.
    """
    with subprocess.Popen(command) as process:
        passed_on = False
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if requests.signal == signal.SIGTERM and not passed_on:
                    process.terminate()
                    passed_on = True


def _place(result: Result) -> tuple[int, int, int]:
    """Where it stands in tables: recipes and pools in the order in which ``--help`` has them."""
    return list(RECIPES).index(result.recipe), POOLINGS.index(result.pool), result.seed


Groups = dict[tuple[str, str], list[Result]]


def _groups(results: Iterable[Result]) -> Groups:
    """The seeds of each recipe and pool."""
    groups: Groups = {}
    for result in sorted(results, key=_place):
        groups.setdefault((result.recipe, result.pool), []).append(result)
    return groups


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None in place of that of a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))


def _cell(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns stand to the left, the others to the right."""
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def table(results: Sequence[Result]) -> str:
    """Markdown: one row for each recipe and pool, mean ± sample standard deviation over seeds.

    A row whose runs were not all made on the same machine and PyTorch has a star;
    :func:`origins` names them.
    """
    classes = list(results[0].sensitivities)
    header = ["recipe", "pooling", "seeds", "test accuracy, %"]
    header += ["test loss, last epoch", "lowest test loss", "last / lowest"]
    header += ["training accuracy, %", "training minus test, points"]
    header += [f"sensitivity {name}, %" for name in classes]
    rows = []
    for (recipe, pool), group in _groups(results).items():
        star = r" \*" if len({r.origin for r in group}) > 1 else ""
        row = [recipe, pool, f"{len(group)}{star}", _cell([r.accuracy for r in group])]
        row += [_cell([r.loss for r in group], 3), _cell([r.lowest_loss for r in group], 3)]
        row += [_cell([r.loss_ratio for r in group]), _cell([r.train_accuracy for r in group])]
        row += [_cell([r.gap for r in group])]
        row += [_cell([r.sensitivities[name] for r in group]) for name in classes]
        rows.append(row)
    return _markdown(header, rows, left=2)


def origins(results: Sequence[Result]) -> str:
    """Markdown: which machines and versions of PyTorch the rows of :func:`table` come from."""
    found: dict[str, Groups] = {}
    for result in results:
        group = found.setdefault(result.origin, {})
        group.setdefault((result.recipe, result.pool), []).append(result)
    if len(found) == 1:
        return f"All runs: {next(iter(found))}."
    lines = ["**Not all runs were made alike**; a row with a star mixes several of these:", ""]
    for origin, group in found.items():
        which = [
            f"{recipe} {pool} (seed {', '.join(str(r.seed) for r in runs)})"
            for (recipe, pool), runs in group.items()
        ]
        lines.append(f"- {origin}: {'; '.join(which)}")
    return "\n".join(lines)


def differences(results: Sequence[Result]) -> str | None:
    """Markdown: for each recipe, test accuracy with stochastic pooling minus the others', paired.

    The runs of one seed start from the same weights and take the images in the same order. None
    where there is nothing to compare.
    """
    groups = _groups(results)
    rows = []
    for (recipe, pool), others in groups.items():
        ours = {r.seed: r.accuracy for r in groups.get((recipe, "stochastic"), [])}
        points = [ours[r.seed] - r.accuracy for r in others if r.seed in ours]
        if pool == "stochastic" or not points:
            continue
        better = f"{sum(p > 0 for p in points)} of {len(points)}"
        if ties := points.count(0):
            better += f", {ties} equal"
        rows.append([recipe, f"stochastic minus {pool}", _cell(points, sign="+"), better])
    header = ["recipe", "test accuracy", "points", "seeds that favour stochastic"]
    return _markdown(header, rows, left=2) if rows else None


def document(results: Sequence[Result], started_with: str, flags: Sequence[str]) -> str:
    """``study.md``.

    Args:
        results: of all finished runs.
        started_with: the command that started the study.
        flags: what each run of train.py was given, beside recipe, pool and seed.
    """
    dates = sorted({result.date for result in results})
    sizes = sorted({(r.train_images, r.test_images) for r in results})
    epochs = {r.recipe: r.epochs for r in results}
    parts = [
        "# Pools and recipes compared",
        table(results),
        "Mean ± sample standard deviation over the seeds. Test accuracy, training accuracy and "
        "sensitivities are those after the last epoch; training images as they are, not "
        "augmented. Sensitivities and training accuracy: in fp32 on the CPU.",
        origins(results),
    ]
    if (paired := differences(results)) is not None:
        parts += ["## Stochastic pooling against the others, seed by seed", paired]
    images = " or ".join(f"{train} training and {test} test images" for train, test in sizes)
    parts += [
        "## Conditions",
        "\n".join(
            [
                f"- started with `{started_with}`",
                "- each run: `train.py --recipe RECIPE --pool POOL --seed SEED "
                f"{shlex.join(flags)}`",
                f"- {images}; epochs: {', '.join(f'{n} ({r})' for r, n in epochs.items())}",
                f"- finished on {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
                f"{sum(r.seconds for r in results) / 3600:.1f} hours of training in all",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def draw(results: Sequence[Result], histories: Sequence[History], path: Path) -> None:
    """Draw test accuracies, and test losses over the epochs, as PNG.

    Args:
        results: of all finished runs.
        histories: theirs, in the same order.
        path: file to write.
    """
    groups = _groups(results)
    recipes = list(dict.fromkeys(recipe for recipe, _ in groups))
    losses = {
        (r.recipe, r.pool, r.seed): [row.test_loss for row in history]
        for r, history in zip(results, histories, strict=True)
    }
    left = max(4.2, 0.85 * len(groups))  # inches
    widths = [left, *[4.2] * len(recipes)]
    figure = Figure(figsize=(sum(widths), 4), dpi=120, layout="constrained")
    accuracy, *curves = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_accuracies(accuracy, groups, recipes)
    highest = max(max(values) for values in losses.values())
    for axis, recipe in zip(curves, recipes, strict=True):
        for (of, pool), group in groups.items():
            if of == recipe:
                runs = [losses[recipe, pool, r.seed] for r in group]
                _draw_losses(axis, runs, pool)
        axis.set_title(f"Test loss, recipe {recipe}")
        axis.set_xlabel("Epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_ylim(0, highest * 1.05)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    report.replace_file(path, figures.png(figure))


def _draw_accuracies(axis: Axes, groups: Groups, recipes: Sequence[str]) -> None:
    """A dot for each seed, and a bar for the mean."""
    place, ticks, names = 0.0, [], []
    for recipe in recipes:
        first = place
        for (of, pool), group in groups.items():
            if of != recipe:
                continue
            values = [r.accuracy for r in group]
            # Side by side in the order of the seeds, so that equal ones do not hide each other.
            step = 0.4 / max(len(values) - 1, 1)
            x = [place + (n - (len(values) - 1) / 2) * step for n in range(len(values))]
            mean, _ = mean_and_deviation(values)
            axis.hlines(mean, place - 0.36, place + 0.36, color=_COLOURS[pool], linewidth=2.5)
            axis.scatter(x, values, s=34, color=_COLOURS[pool], edgecolors="white", zorder=3)
            axis.annotate(
                f"{mean:.1f}",
                (place, max(values)),
                (0, 7),
                textcoords="offset points",
                ha="center",
            )
            ticks.append(place)
            names.append(pool)
            place += 1
        axis.text(
            (first + place - 1) / 2,
            -0.085,
            f"recipe {recipe}",
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="top",
        )
        place += 0.5
    axis.set_xticks(ticks, names)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.7, place - 0.8)
    axis.margins(y=0.12)
    axis.set_title("Last test accuracy (%): seeds and mean")
    axis.grid(axis="y", alpha=0.3)


def _draw_losses(axis: Axes, runs: Sequence[Sequence[float]], pool: str) -> None:
    """A thin line for each seed, and a thick one for their mean."""
    for losses in runs:
        axis.plot(range(1, len(losses) + 1), losses, color=_COLOURS[pool], alpha=0.3, linewidth=0.8)
    means = [math.fsum(column) / len(runs) for column in zip(*runs, strict=False)]
    axis.plot(range(1, len(means) + 1), means, color=_COLOURS[pool], linewidth=2, label=pool)
