"""The compiled kernels, executed by an emulator of a GPU that lies beside the project.

A file of its own, for it takes minutes in CI, whose processes share out the files.
"""

from __future__ import annotations

import sys

import pytest

from .scripts import ROOT, run_python


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assemblers come with Linux wheels")
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
    check = ROOT.parent / "shared" / "gpu" / "check.py"
    if not check.exists():
        pytest.skip("no emulator of a GPU beside the project")
    run = run_python(str(check), "--no-traffic", *cases)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ": 0 cases, " not in run.stdout, "no case has this name"
