"""The benches: everybody gets a fair turn, wrong contestants are caught, results are recorded."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .scripts import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


def test_slow_contestants_run_less_often_but_all_the_time(bench) -> None:
    contest: ModuleType = bench("contest")
    order = contest.turns(1.0, {"fast": 0.025, "slow": 0.125})
    assert (order.count("fast"), order.count("slow")) == (40, 8)
    places = [place for place, name in enumerate(order) if name == "slow"]
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert gaps == {6}
    assert len(contest.turns(1.0, {"fast": 1e-6})) == contest.MAX_ROUNDS
    never = contest.turns(1e-6, {"fast": 1.0, "slow": 1.0})
    assert never.count("slow") == contest.MIN_ROUNDS


def test_preparation_is_outside_the_clock_and_memory_is_counted(bench) -> None:
    contest = bench("contest")
    log = []
    busy = contest.Contestant(
        lambda x: log.append(("run", x)), prepare=lambda: (time.sleep(0.02) or 7,)
    )
    rounds = contest.time_in_turn({"busy": busy}, CPU, 0.0)["busy"]
    assert len(rounds) == contest.MIN_ROUNDS
    assert max(rounds) < 0.02
    assert set(log) == {("run", 7)}
    two = contest.Contestant(lambda: torch.ones(10_000) + torch.ones(10_000))
    assert 120_000 <= contest.peak_memory(two, CPU) < 121_000


@pytest.mark.slow
def test_a_pool_that_computes_something_else_is_not_timed(bench, monkeypatch) -> None:
    operator = bench("bench_operator")
    small = operator.Layer("small", 3, 8, (3, 1, 1), 2, 2)
    work = operator.Pooling(small, "fp32", "contiguous", "training", CPU)
    work.contestant("stochastic")
    pool = operator.stochastic_pool2d

    def skewed(*arguments, **options):
        wrong = os.environ.get("STOCHASTIC_POOLING_BACKEND") != "torch"
        return pool(*arguments, **options) * (1.01 if wrong else 1)

    monkeypatch.setattr(operator, "stochastic_pool2d", skewed)
    with pytest.raises(AssertionError, match="stochastic differs from the reference"):
        work.contestant("stochastic")


def test_one_that_fails_takes_none_of_the_others_with_it(bench) -> None:
    contest = bench("contest")

    def wrong():
        raise AssertionError

    def large():
        raise torch.OutOfMemoryError

    makers = {
        "good": lambda: contest.Contestant(lambda: torch.ones(3)),
        "wrong": wrong,
        "large": large,
    }
    outcomes = contest.hold(makers, CPU, 0.0)
    assert len(outcomes["good"].seconds) == contest.MIN_ROUNDS
    assert isinstance(outcomes["wrong"], AssertionError)
    assert isinstance(outcomes["large"], torch.OutOfMemoryError)
    assert contest.hold({"large": large}, CPU, 0.0).keys() == {"large"}


def test_bytes_are_those_of_the_model(bench) -> None:
    operator = bench("bench_operator")
    cuda, layer = torch.device("cuda"), operator.LAYERS[0]
    half = operator.Pooling(layer, "fp16", "contiguous", "training", cuda)
    outputs = 2 * 40 * 86 * 86
    assert half.bytes_moved(2) == 10 * outputs
    evaluation = half._replace(layer=operator.LAYERS[4], step="evaluation")
    assert evaluation.bytes_moved(2) == 2 * (4 + 1) * 2 * 64 * 112 * 112


def benchmark(case: str, name: str, milliseconds: float) -> dict:
    info = {"gb_per_second": 1.0, "share_of_copy_bandwidth": 0.5, "peak_memory_bytes": 2e6}
    return {
        "fullname": f"bench/bench_operator.py::test_operator[{case}-{name}]",
        "group": case,
        "params": {"case": "UNSERIALIZABLE", "contestant": name},
        "stats": {"median": milliseconds / 1e3},
        "extra_info": info,
    }


def test_report_gives_ratios(bench, tmp_path, capsys) -> None:
    report = bench("report")
    machine = {
        "cpu": {"brand_raw": "A processor", "count": 2},
        "threads": 2,
        "torch": "2.14.1",
        "triton": None,
        "numba": "0.61",
        "cpu_capability": "AVX2",
        "python_version": "3.11.0",
        "system": "Linux",
    }
    rows = [benchmark("pool-training", "max", 8.0), benchmark("pool-training", "stochastic", 2.0)]
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}))
    report.main([str(file)])
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "one.md").read_text(encoding="utf-8")
    (line,) = [line for line in table.splitlines() if "pool-training" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["pool-training", "8.00", "0.25 ×", "1.0", "0.50", "2.0", "2.0"]  # noqa: RUF001
    file.write_text("[]")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(file)])
    assert "one.json is no file" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(ROOT.glob("bench/results/benchmarks-*.json")))
def test_committed_results_can_be_read(bench, file: Path) -> None:
    report = bench("report")
    committed = file.with_suffix(".md").read_text(encoding="utf-8")
    assert report.markdown(json.loads(file.read_text())) == committed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles kernels on a GPU")
def test_a_contest_ends_up_in_the_file(tmp_path) -> None:
    """The command that users run, on the smallest layer."""
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_operator.py", "--benchmark-only", "-q"]
    command += ["-k", "pool3to5-fp32-channels_last-evaluation", "--benchmark-max-time", "0.1"]
    command += ["-p", "no:cacheprovider", "--benchmark-json", str(file)]
    # In one of several processes of pytest-xdist, pytest-benchmark measures nothing.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert "node" not in content["machine_info"]
    assert content["copy_bandwidth_gb_per_second"] > 0
    found = {row["params"]["contestant"]: row for row in content["benchmarks"]}
    assert set(found) == {"stochastic", "max", "avg"}
    # What pytest-benchmark sums up is what was measured: bytes over the median.
    ours = found["stochastic"]
    rate = ours["extra_info"]["bytes"] / ours["stats"]["median"] / 1e9
    assert ours["extra_info"]["gb_per_second"] == pytest.approx(rate)
