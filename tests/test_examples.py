"""What `examples/` shows is so: each script runs, and its figures are what its text claims."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


# On a CPU the kernels would take longer to compile than the examples to run.
pytestmark = pytest.mark.usefixtures("plain")


def main_of(name: str) -> Callable[..., Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_run_here() -> None:
    tested = {"amp", "custom_autograd", "torchvision_model"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_a_network_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    losses = main_of("torchvision_model")(steps=10)
    assert losses[-1] < 0.8 * losses[0]
    printed = capsys.readouterr().out
    assert "features.2: ReLU features.1, bias of features.0" in printed
    assert printed.count("±") == 6


def test_mixed_precision(capsys: pytest.CaptureFixture[str]) -> None:
    losses = main_of("amp")()
    assert losses[-1] < 0.7 * losses[0]
    dtype = torch.float16 if torch.cuda.is_available() else torch.bfloat16
    printed = capsys.readouterr().out
    assert f"pooled {dtype}, bias torch.float32, its gradient torch.float32" in printed


def test_a_gradient_of_ones_own() -> None:
    """It is the expectation's whatever was drawn; the operator's own is neither."""
    results = main_of("custom_autograd")(draws=50)
    error, spread = results["the mean"]
    assert error < 1e-5
    assert spread < 1e-5
    error, spread = results["the drawn cell"]
    assert error > 0.2
    assert spread > 0.2
