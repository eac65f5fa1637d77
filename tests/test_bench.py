"""The benches: everybody gets a fair turn, wrong contestants are caught, reports mix nothing."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of bench/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


def test_slow_contestants_run_less_often_but_all_the_time(bench) -> None:
    contest: ModuleType = bench("contest")
    contestants = dict.fromkeys(("fast", "slow"), contest.Contestant(lambda _: None))
    order = list(contest._turns(contestants, 2.0, {"fast": 0.02, "slow": 0.1}))
    assert (order.count("fast"), order.count("slow")) == (50, 10)
    places = [place for place, name in enumerate(order) if name == "slow"]
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert gaps == {6}
    never = list(contest._turns(contestants, 1e-6, {"fast": 1.0, "slow": 1.0}))
    assert never.count("slow") == contest.MIN_ROUNDS


def test_preparation_is_outside_the_clock_and_memory_is_counted(bench) -> None:
    contest = bench("contest")
    log = []
    busy = contest.Contestant(
        lambda x: log.append(("run", x)), prepare=lambda: log.append("prepared") or 7
    )
    times = contest._cpu_rounds({"busy": busy}, 0.0, 0)
    assert len(times["busy"]) == contest.MIN_ROUNDS
    assert log == ["prepared", ("run", 7)] * (contest.MIN_ROUNDS + 2)
    two = contest.Contestant(lambda _: torch.ones(10_000) + torch.ones(10_000))
    assert 120_000 <= contest.peak_memory(two, CPU) < 121_000


def test_a_pool_that_computes_something_else_is_not_timed(bench, monkeypatch) -> None:
    operator = bench("bench_operator")
    small = operator.Layer("small", 3, 8, 3, 1, 1, 2, 2)
    case = operator.PoolCase(small, "fp32", "contiguous", "training", True, CPU)
    ours = case.contestants()["stochastic"]()
    case.check("stochastic", ours)

    def skewed(*arguments, **options):
        return pool(*arguments, **options) * 1.01

    pool = operator.stochastic
    by_reference = operator.by_reference

    def reference_as_it_was(function):
        def run(*arguments):
            monkeypatch.setattr(operator, "stochastic", pool)
            return by_reference(function)(*arguments)

        return run

    monkeypatch.setattr(operator, "stochastic", skewed)
    monkeypatch.setattr(operator, "by_reference", reference_as_it_was)
    with pytest.raises(AssertionError, match="stochastic differs from reference"):
        case.check("stochastic", ours)


def test_one_that_fails_takes_none_of_the_others_with_it(bench) -> None:
    contest = bench("contest")

    class Mixed(contest.Case):
        names = ("good", "wrong", "large")

        def __str__(self) -> str:
            return "mixed"

        def contestants(self):
            return dict.fromkeys(self.names, lambda: contest.Contestant(lambda _: torch.ones(3)))

        def check(self, name, contestant) -> None:
            if name == "wrong":
                raise AssertionError(name)
            if name == "large":
                raise torch.OutOfMemoryError

    outcomes = contest.hold(Mixed(), list(Mixed.names), CPU, 0.0, 1e9)
    assert len(outcomes["good"].seconds) == contest.MIN_ROUNDS
    assert isinstance(outcomes["wrong"].error, AssertionError)
    assert outcomes["large"].skipped == contest.NO_MEMORY
    alone = contest.hold(Mixed(), ["large"], CPU, 0.0, 1e9)
    assert alone["large"].skipped == contest.NO_MEMORY


def test_bytes_are_those_of_the_model(bench) -> None:
    operator = bench("bench_operator")
    layer = operator.LAYERS[0]
    half = operator.PoolCase(layer, "fp16", "contiguous", "training", True, torch.device("cuda"))
    outputs = 2 * 40 * 86 * 86
    assert half._bytes_moved("stochastic", 2) == 10 * outputs
    assert half._bytes_moved("max", 2) == 42 * outputs
    assert half._bytes_moved("max_compiled", 2) == 18 * outputs
    assert half._bytes_moved("gist", 2) is None


def benchmark(case: str, name: str, milliseconds: float) -> dict:
    info = {"gb_per_second": 1.0, "share_of_copy_bandwidth": 0.5, "peak_memory_bytes": 2e6}
    return {
        "fullname": f"bench/bench_operator.py::test_operator[{case}-{name}]",
        "group": case,
        "params": {"case": "UNSERIALIZABLE", "contestant": name},
        "stats": {"median": milliseconds / 1e3},
        "extra_info": info,
    }


def test_report_gives_ratios_and_refuses_to_mix_machines(bench, tmp_path, capsys) -> None:
    report = bench("report")
    machine = {
        "cpu": {"brand_raw": "A processor", "count": 2},
        "threads": 2,
        "torch": "2.14.1",
        "cpu_capability": "AVX2",
        "python_version": "3.11.0",
        "system": "Linux",
    }
    rows = [benchmark("pool-training", "max", 8.0), benchmark("pool-training", "stochastic", 2.0)]
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}))
    assert report.main([str(one)]) == 0
    table = (tmp_path / "one.md").read_text(encoding="utf-8")
    assert "| pool-training | 8.00 | 0.25 " in table
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")

    faster = copy.deepcopy(machine)
    faster["threads"] = 4
    other.write_text(json.dumps({"machine_info": faster, "benchmarks": rows}))
    capsys.readouterr()
    assert report.main([str(one), str(other)]) == 2
    assert "different machines or settings" in (said := capsys.readouterr().err)
    assert "threads: 2 and 4" in said
    one.write_text("[]")
    assert report.main([str(one)]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles kernels on a GPU")
def test_a_contest_ends_up_in_the_file(tmp_path) -> None:
    """The command that users run, on the smallest layer."""
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_operator.py", "--benchmark-only", "-q"]
    command += ["-k", "pool3to5-fp32-channels_last-evaluation", "--budget", "0.1"]
    command += ["-p", "no:cacheprovider", "--benchmark-json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert "node" not in content["machine_info"]
    assert content["copy_bandwidth_gb_per_second"] > 0
    found = {row["params"]["contestant"]: row for row in content["benchmarks"]}
    assert set(found) == {"stochastic", "max", "avg"}
    for row in found.values():
        # What pytest-benchmark sums up is what was measured: bytes over the median.
        rate = row["extra_info"]["bytes"] / row["stats"]["median"] / 1e9
        assert row["extra_info"]["gb_per_second"] == pytest.approx(rate)
