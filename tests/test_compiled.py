"""What Triton compiles the kernels to, for GPUs that are not there."""

from __future__ import annotations

import json
import sys

import pytest

from .scripts import ROOT, run_python

# What sm_80 and sm_89 take is nearly sm_86's.
TARGETS = [["sm_86"], ["sm_75", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assemblers come with Linux wheels")
@pytest.mark.parametrize("targets", TARGETS, ids=["one", "others"])
def test_kernels_compile_for_every_target_and_none_got_worse(targets, tmp_path):
    """CNN_SP's window and a large one in fp16; `bench/results/` has the other rows.

    Worse than with the same Triton: what another one makes of the kernels is not their doing.
    """
    triton = pytest.importorskip("triton")
    rows_file = tmp_path / "rows.json"
    command = ["bench/kernel_report.py", "--json", str(rows_file)]
    command += ["--dtype", "float16", "--window", "3x3 s1 p1", "--target", *targets]
    command += ["--window", "5x5 s1 p2"] if targets == ["sm_86"] else []
    committed = ROOT / "bench" / "results" / f"kernel_report-triton{triton.__version__}.json"
    if committed.exists():
        command += ["--check", str(committed)]
    run = run_python(*command)
    # Without a report it may be a newer Triton, whose spills are news and no fault of a change.
    assert run.returncode == 0 or not committed.exists(), run.stdout + run.stderr
    assert rows_file.exists(), run.stdout + run.stderr
    rows = json.loads(rows_file.read_text())
    assert {row["target"] for row in rows} == set(targets)
    assert {row["kernel"] for row in rows} == {
        "sample_sliding_kernel", "expectation_sliding_kernel",
        "gather_sliding_kernel", "gradient_sliding_kernel",
    }  # fmt: skip


VARIANTS = """
import sys; sys.path.insert(0, "bench")
from collections import defaultdict
import torch, triton, kernel_report
from stochastic_pooling.gpu import launch as backend
from stochastic_pooling.window import Window

def window(kernel, stride, padding):
    return Window(kernel, kernel, stride, stride, padding, padding, 1, 1, False)

def launch(shape, window, layout, dtype=torch.float16):
    x = torch.empty(shape, dtype=dtype, memory_format=layout)
    seed = torch.empty((), dtype=torch.int64)
    output, code = backend.sample(x, None, seed, window)
    backend.sample_backward(output, code, shape[2:], window, True)
    backend.expectation(x, None, window)
    backend.expectation_backward(output, x, None, window, True)

def variants(shapes, window, layout=torch.contiguous_format):
    keys = defaultdict(set)

    def count(key, fn, **_):
        keys[fn.name].add(key)
        return True  # nothing is compiled

    triton.runtime.driver.set_active(kernel_report._AbsentGpu(kernel_report.TARGETS["sm_86"]))
    triton.knobs.runtime.jit_cache_hook = count
    for shape in shapes:
        launch(shape, window, layout)
    return {name: len(found) for name, found in keys.items()}

def compiled(*arguments):
    call = lambda: launch(*arguments)
    return [found.name for found in kernel_report.compiled(call, kernel_report.TARGETS["sm_86"])]
"""
# Triton turns an argument of 1 into a constant, which the interpreter does not. To be called first.
ONE_CHANNEL = "compiled((1, 1, 1, 8), window(3, 1, 1), torch.contiguous_format, torch.float32)"


# Sliding draws, backwards, expectations and gradients of these; or the general kernels.
SWEEPS = {
    "sizes": ("[(2, 4, n, n) for n in range(20, 257, 3)], window(3, 2, 1)", (4, 2, 4, 2)),
    "sizes, channels_last": (
        "[(2, 8, n, n) for n in range(20, 257, 3)], window(3, 2, 1), torch.channels_last",
        (4, 1, 4, 2),
    ),
    "VGG-16": (
        "[(2, c, n, n) for c, n in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))],"
        " window(2, 2, 0)",
        (2, 1, 2, 1),
    ),
    "batches": ("[(n, 4, 30, 30) for n in range(1, 65)], window(3, 1, 1)", (1, 1, 1, 1)),
    "channels": ("[(2, c, 28, 28) for c in range(8, 129)], window(3, 1, 1)", (1, 1, 1, 1)),
    "channels, channels_last": (
        "[(2, c, 28, 28) for c in range(8, 129)], window(3, 1, 1), torch.channels_last",
        (17, 17, 17, 17),  # sixteen multiples of 8, the others
    ),
    "larger": ("[(2, 4, n, n) for n in range(20, 257, 3)], window(5, 2, 2)", (4, 2, 4, 2)),
    "general": ("[(2, 4, n, n) for n in range(20, 257, 3)], window(6, 2, 2)", (2, 2, 4)),
}


@pytest.mark.slow
def test_few_variants_are_compiled_and_one_channel_can_be():
    """A kernel takes seconds to compile: not for each size of image, batch or number of channels.

    Counted by the keys that Triton would compile for.
    """
    pytest.importorskip("triton")
    calls = ", ".join(f"{name!r}: variants({sweep})" for name, (sweep, _) in SWEEPS.items())
    if sys.platform == "linux":  # Triton's assemblers come with Linux wheels
        calls = f"'one channel': {ONE_CHANNEL}, {calls}"
    run = run_python("-c", f"{VARIANTS}\nimport json; print(json.dumps({{{calls}}}))")
    assert run.returncode == 0, run.stderr
    calls = ("sample", "gather", "expectation", "gradient")
    sliding = [f"{call}_sliding_kernel" for call in calls]
    counted = json.loads(run.stdout)
    assert counted.pop("one channel", sliding) == sliding
    for sweep, found in counted.items():
        kernels = sliding
        if sweep == "general":
            kernels = ["sample_kernel", "gather_kernel", "expectation_kernel"]
        assert set(found) == set(kernels)
        limits = zip(kernels, SWEEPS[sweep][1], strict=True)
        assert all(found[name] <= limit for name, limit in limits), (sweep, found)


REPEATED = """
class Gpu(kernel_report._AbsentGpu):
    # Notes the launches instead.
    utils = type("", (), {
        "load_binary": lambda *_: (0, 0, 0, 0, 1024),
        "get_device_properties": lambda *_: {"max_shared_mem": 2**17},
    })
    def launcher_cls(self, *_):
        return lambda *arguments: launches.append(arguments[:6] + arguments[7:])  # no metadata

def noted(*arguments):
    launches.clear()
    launch(*arguments)
    return list(launches)

launches, slow = [], triton.runtime.jit.JITFunction.run
triton.runtime.driver.set_active(Gpu(kernel_report.TARGETS["sm_86"]))
for size, layout, dtype in (
    (2, torch.contiguous_format, torch.float16), (5, torch.channels_last, torch.float64)
):
    arguments = (2, 8, 9, 9), window(size, 1, 1), layout, dtype
    first = noted(*arguments)
    triton.runtime.jit.JITFunction.run = None  # Triton need not find out again what to launch
    again = noted(*arguments)
    triton.runtime.jit.JITFunction.run = slow
    assert len(first) == len(again) == (4 if size == 2 else 5)
    for one, other in zip(first, again, strict=True):
        for mine, right in zip(one, other, strict=True):
            if isinstance(mine, torch.Tensor):
                mine, right = (mine.shape, mine.dtype), (right.shape, right.dtype)
            assert mine == right
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assemblers come with Linux wheels")
def test_a_second_launch_is_the_first():
    pytest.importorskip("triton")
    run = run_python("-c", VARIANTS + REPEATED)
    assert run.returncode == 0, run.stderr
