"""The compiled kernels on an emulator and a simulator of a GPU that lie beside the project.

A file of its own, for it takes minutes in CI, whose processes share out the files.
"""

from __future__ import annotations

import sys

import pytest

from .scripts import ROOT, run_python

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton's assemblers come with Linux wheels"
)


def run(name: str, *arguments: str) -> str:
    """What an instrument says."""
    script = ROOT.parent / "shared" / "gpu" / name
    if not script.exists():
        pytest.skip(f"no {name} beside the project")
    run = run_python(str(script), *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "cases",
    [
        ["--only", "small: 2x3x13x6 f16 nchw 2x2 s22 p11 d11 plain"],
        # Quotients as imprecise as a GPU's may be: near the largest number they overflowed.
        pytest.param(
            ["--only", "content: 2x4x11x10 f32 nchw 3x3 s11 p11 d11 mixed", "--approximate", "1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--quick"], marks=pytest.mark.slow),
    ],
    ids=["one", "approximate", "every fifth"],
)
def test_compiled_code_executed_by_an_emulator(cases):
    """What the interpreter cannot see: the machine's own accesses to memory, and its rounding."""
    assert ": 0 cases, " not in run("check.py", "--no-traffic", *cases), "no case has this name"


def test_a_simulator_knows_the_kernel_report():
    """It makes what bench/kernel_report.py makes, so it fails where that changes."""
    case = ["--pool", "3", "--call", "sample", "--layout", "contiguous", "--target", "sm_86"]
    assert "pool3 sample" in run("simulate.py", *case)
