"""`pytest bench/ --benchmark-only`: every module here has `cases(device)`, whose contestants are
timed in turn (contest.py) and recorded by pytest-benchmark, one test each."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable

import pytest
import torch
from contest import Case, Outcome, ReplayClock, copy_bandwidth, hold

from cnnsp.training.devices import keep_freed_memory

# As train.py does: else page faults take a good part of every step on a CPU.
keep_freed_memory()

CLOCK = ReplayClock()
COPY_RATE = pytest.StashKey[float]()
OUTCOMES = pytest.StashKey[dict[str, dict[str, Outcome]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contests", "Contests of bench/")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    group.addoption(
        "--threads", type=int, help="of PyTorch and the CPU kernels; default: PyTorch's"
    )
    group.addoption(
        "--budget",
        type=float,
        default=90.0,
        metavar="SECONDS",
        help="for all rounds together; compiling, checking and slow contestants come on top",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config.option, "budget"):
        raise pytest.UsageError("name the folder, as in `pytest bench/`: it has options of its own")
    if config.option.device is None:
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this machine, or this PyTorch, has no CUDA")
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    config.stash[OUTCOMES] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases: list[Case] = metafunc.module.cases(torch.device(metafunc.config.option.device))
    entries = [(case, name) for case in cases for name in case.names]
    ids = [f"{case}-{name}" for case, name in entries]
    metafunc.parametrize(("case", "contestant"), entries, ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def contest(benchmark, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Record a contestant; the first of a case starts the contest of all that were selected."""
    config = request.config
    device = torch.device(config.option.device)

    def record(case: Case, contestant: str) -> None:
        outcomes = config.stash[OUTCOMES]
        if str(case) not in outcomes:
            selected = [getattr(item, "callspec", None) for item in request.session.items]
            selected = [call.params for call in selected if call and "contestant" in call.params]
            names = [chosen["contestant"] for chosen in selected if chosen["case"] is case]
            seconds = config.option.budget / len({str(chosen["case"]) for chosen in selected})
            outcomes[str(case)] = hold(case, names, device, seconds, copy_rate(config))
        outcome = outcomes[str(case)][contestant]
        if outcome.error:
            raise outcome.error
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        benchmark.group = str(case)
        benchmark.extra_info.update(outcome.info)
        CLOCK.load(outcome.seconds)
        benchmark.pedantic(lambda: None, rounds=len(outcome.seconds))

    return record


def copy_rate(config: pytest.Config) -> float:
    if COPY_RATE not in config.stash:
        config.stash[COPY_RATE] = copy_bandwidth(torch.device(config.option.device))
    return config.stash[COPY_RATE]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    # Names of computers are nobody's business, and what changes without a change of speed does not
    # make another machine.
    for name in ("node", "release", "python_build"):
        machine_info.pop(name, None)
    for volatile in ("hz_actual", "hz_actual_friendly", "hz_advertised", "hz_advertised_friendly"):
        machine_info["cpu"].pop(volatile, None)
    machine_info["device"] = config.option.device
    machine_info["threads"] = torch.get_num_threads()
    for package in ("torch", "triton", "numba", "torchvision"):
        try:
            machine_info[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine_info[package] = None
    machine_info["torch"] = torch.__version__
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if config.option.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine_info["gpu"] = properties.name
        machine_info["gpu_memory_bytes"] = properties.total_memory
        machine_info["cuda"] = torch.version.cuda or torch.version.hip
        machine_info["driver"] = driver_version()
    machine_info["system"] = platform.system()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["params"]["case"] = benchmark["group"]  # a name, and not an object's address
        benchmark["stats"].pop("data", None)  # the quartiles tell enough
    # Not part of the machine: it differs from run to run.
    output_json["copy_bandwidth_gb_per_second"] = copy_rate(config) / 1e9


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
