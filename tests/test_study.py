"""The study of pools and recipes: its table and figure by hand, and its runs on a tiny set."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from cnnsp import CNN_SP
from cnnsp.data.batches import ImageBank
from cnnsp.data.images import load_folder
from cnnsp.interruption import Requests
from cnnsp.results import study
from cnnsp.results.study import cases
from cnnsp.results.study_report import differences, draw, lines, origins, read, table

from .scripts import ROOT, load_script
from .test_train import make_photographs

main = load_script("study").main


def runs(*rows: tuple[str, int, float] | dict[str, Any], folder: Path) -> pd.DataFrame:
    """Runs whose other figures do not matter: pool, seed and accuracy, or what differs besides."""
    usual = {
        "recipe": "paper",
        "epochs": 2,
        "train_images": 300,
        "test_images": 600,
        "test_loss": 1.5,
        "lowest_test_loss": 0.5,
        "train_accuracy": 100.0,
        "sensitivity daisy": 80.0,
        "sensitivity rose": 70.0,
        "machine": "one",
        "torch": "2.14.1",
        "threads": 2,
    }
    given = [r if isinstance(r, dict) else dict(zip(KEYS, r, strict=True)) for r in rows]
    pd.DataFrame([{**usual, **r} for r in given]).to_csv(folder / "runs.csv", index=False)
    return read(folder / "runs.csv")


KEYS = ("pool", "seed", "test_accuracy")


def rows_of(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_a_study_goes_seed_by_seed() -> None:
    assert list(map(str, cases(["paper"], ["stochastic", "max"], 2))) == [
        "paper-stochastic-0",
        "paper-max-0",
        "paper-stochastic-1",
        "paper-max-1",
    ]


def test_table_has_means_and_sample_deviations_over_seeds(tmp_path: Path) -> None:
    def ours(seed: int, accuracy: float, loss: float, training: float) -> dict[str, Any]:
        row = dict(zip(KEYS, ("stochastic", seed, accuracy), strict=True))
        return {**row, "test_loss": loss, "train_accuracy": training}

    found = runs(
        ("max", 0, 70.0),
        ours(2, 84.0, 2.0, 98.0),
        ours(0, 80.0, 1.0, 100.0),
        ours(1, 82.0, 1.5, 100.0),
        folder=tmp_path,
    )
    header, _, stochastic, largest = rows_of(table(found))
    assert header[:4] == ["recipe", "pooling", "seeds", "test accuracy, %"]
    # Squares of the distances from 82: 4, 0, 4; divided by 2.
    assert stochastic == [
        *("paper", "stochastic", "3", "82.00 ± 2.00", "1.500 ± 0.500", "0.500 ± 0.000"),
        *("99.33 ± 1.15", "80.00 ± 0.00", "70.00 ± 0.00"),
    ]
    assert largest[1:] == ["max", "1", "70.00", "1.500", "0.500", "100.00", "80.00", "70.00"]


def test_differences_pair_the_seeds(tmp_path: Path) -> None:
    found = runs(
        *(("stochastic", seed, a) for seed, a in enumerate([80.0, 81.0, 84.0, 90.0])),
        *(("max", seed, a) for seed, a in enumerate([79.0, 82.0, 81.0])),
        ("avg", 0, 80.0),
        folder=tmp_path,
    )
    text = differences(found)
    assert text is not None
    # 1, -1 and 3: the mean is 1, the squares of the distances 0, 4 and 4. Seed 3 has no partner.
    assert rows_of(text)[2:] == [
        ["paper", "stochastic minus max", "+1.00 ± 2.00", "2 of 3"],
        ["paper", "stochastic minus avg", "+0.00", "0 of 1, 1 equal"],
    ]
    assert differences(found[found["pool"] != "stochastic"]) is None


def test_rows_that_mix_machines_are_marked(tmp_path: Path) -> None:
    alike = [("stochastic", 0, 80.0), ("stochastic", 1, 81.0), ("max", 0, 79.0)]
    found = runs(*alike, folder=tmp_path)
    assert origins(found) == "All runs: one, torch 2.14.1, 2 threads."
    assert "*" not in table(found)
    for name, value in (("machine", "two"), ("torch", "2.15"), ("threads", 1)):
        mixed = found.copy()
        mixed.loc[1, name] = value
        _, _, stochastic, largest = rows_of(table(mixed))
        assert (stochastic[2], largest[2]) == (r"2 \*", "1")
        _, _, first, second = origins(mixed).splitlines()
        assert first == (
            "- one, torch 2.14.1, 2 threads: paper stochastic (seed 0); paper max (seed 0)"
        )
        assert second.endswith(": paper stochastic (seed 1)")


def test_losses_of_one_epoch_are_points(tmp_path: Path) -> None:
    axis = Figure().subplots()
    epochs = runs(("max", 0, 80.0), ("max", 1, 80.0), folder=tmp_path).assign(epoch=1)
    lines(axis, epochs, "test_loss")
    assert axis.lines[-1].get_marker() == "o"


def test_figure_shows_accuracies_and_losses(tmp_path: Path) -> None:
    found = runs(
        *((pool, seed, 80.0) for pool in ("stochastic", "max") for seed in range(2)),
        folder=tmp_path,
    )
    epochs = found.merge(pd.DataFrame({"epoch": [1, 2]}), how="cross")
    draw(found, epochs, tmp_path / "study.png")
    with Image.open(tmp_path / "study.png") as image:
        assert image.width > 900
        colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None
    shown = {colour for _, colour in colours}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= shown  # of the means
    assert (0x00, 0x9E, 0x73) not in shown  # no average pooling here


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("study") / "the photos")


class Runner:
    """Runs train.py in this process, and keeps the commands.

    Attributes:
        commands: what was run.
        statuses: exit statuses to give, by the folder's name, in place of a run.
    """

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.statuses: dict[str, int] = {}

    def __call__(self, command: Sequence[str], requests: Requests) -> int:
        python, script, *arguments = command
        assert python == sys.executable
        assert Path(script).resolve() == ROOT / "scripts/train.py"
        self.commands.append(arguments)
        folder = Path(arguments[arguments.index("--output-dir") + 1])
        status = self.statuses.get(folder.name)
        return load_script("train").main(arguments) if status is None else status


@pytest.fixture
def runner(monkeypatch) -> Runner:
    runner = Runner()
    monkeypatch.setattr(study, "call", runner)
    return runner


def arguments(photos: Path, output: Path, *flags: str) -> list[str]:
    ours = ["--data-dir", str(photos), "--output-dir", str(output), "--device", "cpu"]
    return [*ours, "--recipes", "paper", "--pools", "max", *flags]


# An epoch of four images.
TINY = ["--augment", "random", "--repeats", "1", "-b", "4"]


@pytest.mark.slow
def test_study_writes_results_and_goes_on_where_it_stopped(
    photos: Path, tmp_path: Path, runner: Runner, monkeypatch, capsys
) -> None:
    output = tmp_path / "study"
    ours = ["--seeds", "2", "--name", "h\udce9re", "--"]  # as names of another encoding reach us
    given = arguments(photos, output, *ours, *TINY, "--epochs", "1")

    # What left no checkpoint does not bind the rest to its flags.
    runner.statuses = {"paper-max-0": 2, "paper-max-1": 2}
    assert main([*given[:-1], "0"]) == 1
    assert len(runner.commands) == 1  # what it refuses at its start, it would refuse again
    runner.commands.clear()

    # The second run fails, and leaves the first alone.
    runner.statuses = {"paper-max-1": 3}
    assert main(given) == 1
    printed = capsys.readouterr()
    assert "failed: paper-max-1 (exit status 3); the same command tries again" in printed.err
    assert f'--recipe paper --pool max --seed 0 --data-dir "{photos}"' in printed.out
    assert list(read(output / "runs.csv")["seed"]) == [0]

    # The first is finished; now the second runs.
    runner.statuses.clear()
    before = (output / "paper-max-0" / "result.json").read_bytes()
    assert main(given) == 0
    assert (output / "paper-max-0" / "result.json").read_bytes() == before
    assert [c[c.index("--seed") + 1] for c in runner.commands] == ["0", "1", "1"]
    results = read(output / "runs.csv")
    assert list(results["seed"]) == [0, 1]
    assert list(results["machine"]) == [r"h\udce9re"] * 2
    assert list(read(output / "epochs.csv")["epoch"]) == [1, 1]
    page = (output / "study.md").read_text(encoding="utf-8")
    assert table(results) in page
    assert "4 training and 2 test images; epochs: 1 (paper)" in page
    assert f'- started with `python scripts/study.py --data-dir "{photos}" ' in page
    assert (output / "study.png").stat().st_size > 10_000

    # Evaluated but not recorded: evaluated again, without training; from another working folder.
    (output / "paper-max-1" / "result.json").unlink()
    monkeypatch.chdir(photos)
    assert main(["--data-dir", ".", *given[2:]]) == 0
    assert len(runner.commands) == 3
    assert read(output / "runs.csv").equals(results)

    # Other flags are refused.
    capsys.readouterr()
    assert main([*given[:-1], "2"]) == 2
    error = capsys.readouterr().err
    run_with = " ".join(["--data-dir", f'"{photos}"', *TINY, "--epochs", "1"])
    assert f"{output / 'paper-max-0'} was run with {run_with}: give the same" in error
    assert error.count("\n") == 1
    assert len(runner.commands) == 3


@pytest.mark.slow
def test_result_is_that_of_the_last_checkpoint(
    photos: Path, tmp_path: Path, runner: Runner
) -> None:
    """Its figures from the weights and from `summary.csv`; begun by train.py, then resumed."""
    output = tmp_path / "study"
    flags = [*TINY, "--epochs", "2"]
    folder = output / "paper-max-0"
    given = arguments(photos, output, "--seeds", "1", "--", *flags)
    runner.statuses["paper-max-0"] = 1
    assert main(given) == 1
    begun = runner.commands[0]
    assert load_script("train").main([*begun, "--max-steps", "1"]) == 0

    runner.statuses.clear()
    assert main(given) == 0
    assert runner.commands[1] == [*begun, "--resume", str(folder / "last.pt")]
    ours = json.loads((folder / "result.json").read_text())
    state = torch.load(folder / "last.pt", weights_only=True)
    last = state["progress"]["history"][-1]
    assert ours["epochs"] == 2
    assert all(ours[name] == last[name] for name in ("test_accuracy", "test_loss"))
    lowest = min(row["test_loss"] for row in state["progress"]["history"])
    assert ours["lowest_test_loss"] == lowest

    model = CNN_SP(2, "max").eval()
    model.load_state_dict(state["model"])
    train, test = load_folder(photos)
    with torch.no_grad():
        on_train, on_test = (
            model(ImageBank(images).batch(torch.arange(len(images)))[0]) for images in (train, test)
        )
    assert ours["train_loss"] == pytest.approx(float(F.nll_loss(on_train, train.labels)), rel=1e-4)
    right = (on_test.argmax(1) == test.labels).tolist()  # one image of each class
    shares = [ours[f"sensitivity {name}"] for name in ("daisy", "rose")]
    assert shares == [100.0 * r for r in right]
    assert ours["train_accuracy"] == 25.0 * int((on_train.argmax(1) == train.labels).sum())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--pools", "median"], "--pools: invalid choice: 'median'"),
        (["--", "--seed", "3"], "--seed is a flag that the study gives itself"),
        (["--", "--pool=max"], "--pool=max is a flag that the study gives itself"),
        (["--data-dir", "tests"], "tests/train_data is missing"),
    ],
)
def test_bad_flags(photos: Path, tmp_path: Path, capsys, flags: list[str], message: str) -> None:
    assert main(arguments(photos, tmp_path / "study", *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_run_that_the_study_did_not_start_is_left_alone(
    photos: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "study" / "paper-max-0"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_bytes(b"mine")
    assert main(arguments(photos, tmp_path / "study")) == 2
    assert f"{folder} holds a run of something else" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["last.pt"]


# Says that it is ready, and ends with status 7 on the signal.
CHILD = """
import pathlib, signal, sys, time
signal.signal(int(sys.argv[2]), lambda *_: sys.exit(7))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals that a process can catch")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_passed_on_to_the_run(tmp_path: Path, name: str) -> None:
    ready, number = tmp_path / "ready", getattr(signal, name)

    def kill() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    with Requests("stopping") as requests:
        threading.Thread(target=kill, daemon=True).start()
        child = [sys.executable, "-c", CHILD, str(ready), str(int(number))]
        assert study.call(child, requests) == 7
    assert requests.signal == number


def test_interrupted_study_says_how_to_go_on(
    photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def interrupted(command: Sequence[str], requests: Requests) -> int:
        signal.raise_signal(signal.SIGINT)
        while requests.signal is None:
            time.sleep(0.001)
        return 130

    monkeypatch.setattr(study, "call", interrupted)
    assert main(arguments(photos, tmp_path / "study", "--seeds", "3")) == 130
    error = capsys.readouterr().err
    assert "SIGINT: stopped at paper-max-0, run 1 of 3; the same command goes on" in error
