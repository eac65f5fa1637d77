"""`pytest bench/ --benchmark-only`: every module here has `cases(device)`, whose contestants are
timed in turn (contest.py) and recorded by pytest-benchmark, one test each.

On the GPU where there is one: with CUDA_VISIBLE_DEVICES= on the CPU. OMP_NUM_THREADS sets the
threads of PyTorch and of the CPU kernels, --benchmark-max-time the seconds for each contestant.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable

import pytest
import torch
from contest import Outcome, copy_bandwidth, hold

from cnnsp.training.devices import keep_freed_memory

# As train.py does: else page faults take a good part of every step on a CPU.
keep_freed_memory()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What pytest-benchmark's clock shows next, from the end: the rounds that were timed before.
readings: list[float] = []
# Of the contests held, by case.
outcomes: dict[str, dict[str, Outcome | Exception]] = {}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """None: they would disturb each other."""
    return 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    entries = [
        pytest.param(case, name, marks=pytest.mark.benchmark(group=case, timer=readings.pop))
        for case, makers in metafunc.module.cases(DEVICE).items()
        for name in makers
    ]
    metafunc.parametrize(("case", "contestant"), entries)


@pytest.fixture
def record(
    benchmark, request: pytest.FixtureRequest, case: str, contestant: str
) -> Callable[[], None]:
    """Record a contestant; the first of a case starts the contest of all that were selected."""

    def record() -> None:
        if case not in outcomes:
            selected = {item.name for item in request.session.items}
            test, makers = request.function.__name__, request.module.cases(DEVICE)[case]
            chosen = {n: make for n, make in makers.items() if f"{test}[{case}-{n}]" in selected}
            outcomes[case] = hold(chosen, DEVICE, float(request.config.option.benchmark_max_time))
        outcome = outcomes[case][contestant]
        if isinstance(outcome, torch.OutOfMemoryError):
            pytest.skip("out of GPU memory")
        if isinstance(outcome, Exception):
            raise outcome
        benchmark.extra_info.update(outcome.info)
        # It asks at the start and at the end of each round.
        readings[:] = [reading for took in reversed(outcome.seconds) for reading in (took, 0.0)]
        benchmark.pedantic(lambda: None, rounds=len(outcome.seconds))

    return record


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    # Names of computers are nobody's business.
    for name in ("node", "release", "python_build"):
        machine_info.pop(name, None)
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    machine_info |= {name: installed.get(name) for name in ("triton", "numba", "torchvision")}
    machine_info["device"] = DEVICE.type
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine_info["gpu"] = properties.name
        machine_info["gpu_memory_bytes"] = properties.total_memory
        machine_info["cuda"] = torch.version.cuda or torch.version.hip
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0"
        machine_info["driver"] = subprocess.getoutput(query)


def pytest_benchmark_update_json(output_json: dict) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # the quartiles tell enough
    # Not part of the machine: it differs from run to run.
    output_json["copy_bandwidth_gb_per_second"] = copy_bandwidth(DEVICE) / 1e9
