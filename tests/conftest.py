"""What the tests share: the device they run on, poisoned allocations and the photographs."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Some tests wait for signals that a shell's background job, and nohup, would have them ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A core each: the threads of two processes on two cores wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# Without a GPU the Triton kernels run in Triton's interpreter; it must be chosen before the kernels
# are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # no Triton here
        importlib.import_module("tests.interpreter")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of a gigabyte or two each; on a GPU, of which some tests take 4 GiB, as many as
    there is room for, since they compile most of the time."""
    if not torch.cuda.is_available():
        return min(os.cpu_count() or 1, 4)
    return min(max(1, (os.cpu_count() or 1) - 2), torch.cuda.mem_get_info()[0] // (6 * 10**9), 16)


# On a GPU PyTorch rounds the operands of fp32 convolutions to ten bits, in some algorithms and not
# in others; what follows a convolution is compared here to more than that.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Of each backend, in the package.
MODULES = {"torch": "reference", "triton": "gpu.launch", "numba": "cpu"}


@pytest.fixture(params=MODULES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device) -> str:
    """Force one backend; the tensors are on `device`, which numba serves only if it is a CPU."""
    if request.param == "numba" and device.type != "cpu":
        pytest.skip("numba serves CPU tensors")
    try:
        importlib.import_module(f"stochastic_pooling.{MODULES[request.param]}")
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", request.param)
    return request.param


@pytest.fixture(
    params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The reference on a CPU, for what does not depend on a backend: numba would compile for each
    window, dtype and mode. A test that takes `backend`, too, has that."""
    if device.type == "cpu":
        monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "torch")


# Cases that take seconds, most of which resemble one that is not here: `slow`, for CI alone.
RESEMBLING = re.compile(
    r"""test_opcheck\[triton
    | test_special_windows\[numba-torch.float16
    | test_one_graph_for_every_batch_size\[(1d|3d|adaptive)
    | test_inductor_draws_what_eager_draws\[.*evaluation
    | test_triton_draws_the_reference_cells\[(?!mixed-contiguous)
    | test_export_for_any_image_size\[(1d|3d|adaptive)
    | test_autocast_keeps_the_dtype\[(torch.bfloat16|.*False)
    | test_gradients_that_autograd_batches\[(triton|numba)-False
    | test_transforms_compile\[evaluation
    | test_strides_of_2_to_the_31\[numba
    | test_shapes_and_errors_are_those_of_max_pooling\[[13]
    | test_windows_of_networks_need_no_reference
    | test_every_16_bit_float\[float16
    | test_exported_networks_say_what_the_network_says
    | test_every_window\[(?!3x3)(?!.*special)
    | test_every_window_that_slides\[(channels_last|contiguous-\((1|2,[ ]3|3,[ ]3\)-\([23]))
    | test_expectations\[(channels_last|.*kernel_h=2,[ ]kernel_w=3)
    | test_expectation\[triton-contiguous-(global|more[ ]than|.*float16)
    | test_any_strides\[(triton|numba)-dilated
    | test_sliding_kernels_notice_a_special_window\[channels_last
    | test_network\[(alexnet|resnet10t|ese_vovnet19b_slim)""",
    re.VERBOSE,
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if RESEMBLING.match(item.name):
            item.add_marker(pytest.mark.slow)


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """One whose state is that of the seed."""
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (or a large odd number), so that an element nobody wrote shows, and
    lies inside a larger storage, so that a write beyond it does."""
    empty = torch.empty
    margins: list[torch.Tensor] = []

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta or type(tensor) is not torch.Tensor:  # without memory
            return tensor
        value = float("nan") if tensor.is_floating_point() else 0x5B
        storage = empty(tensor.numel() + 2048, dtype=tensor.dtype, device=tensor.device)
        storage.fill_(0x77)
        margins.extend((storage[:1024], storage[-1024:]))
        # Not a view of it: forward mode takes none whose tangents lie in smaller storages.
        inside = empty(0, dtype=tensor.dtype, device=tensor.device)
        inside.set_(storage.untyped_storage(), 1024, tensor.shape, tensor.stride())
        return inside.fill_(value)

    for make in (empty, torch.empty_like, torch.empty_strided):
        monkeypatch.setattr(torch, make.__name__, lambda *a, m=make, **k: poison(m(*a, **k)))
    yield
    assert all(bool((margin == 0x77).all()) for margin in margins), "a write beyond a tensor"


@pytest.fixture
def photographs() -> Path:
    """The flower photographs beside the project; they are not part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "flowers"
    if not folder.is_dir():
        pytest.skip("no flower photographs beside the project")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test draws its inputs from the same state, whichever tests ran before it."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
