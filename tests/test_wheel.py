"""The wheel: built from a copy, small, with nothing but the packages, and used alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# Run from another folder, as where nothing but PyTorch is installed: macOS has no Triton.
USE = """
import sys
sys.modules["triton"] = sys.modules["numba"] = None  # an import fails
import torch
before = set(sys.modules)
import stochastic_pooling
from stochastic_pooling import stochastic_pool2d

added = {name.partition(".")[0] for name in set(sys.modules) - before}
training = {"cnnsp", "numpy", "torchvision", "PIL", "matplotlib", "tabulate", "tensorboard", "tqdm"}
assert not added & training, added & training

x = torch.randn(2, 3, 8, 8, requires_grad=True)
y = stochastic_pool2d(x, 3, 2, 1)
assert y.shape == (2, 3, 4, 4)
y.sum().backward()
assert x.grad.sum() == (y > 0).sum()

import cnnsp
output = cnnsp.CNN_SP()(torch.randn(1, 3, 256, 256))
assert output.shape == (1, 3)
output.sum().backward()
print(stochastic_pooling.__file__)
print(cnnsp.__file__)
"""


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("pip", "hatchling"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"building a wheel needs {needed} here")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "project"  # so that nothing is left in the tree
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "cnnsp", "bench", "docs", "examples", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name)
    # What the interpreter leaves behind has no place in a wheel.
    (copy / "cnnsp" / "__pycache__").mkdir(exist_ok=True)
    (copy / "cnnsp" / "__pycache__" / "left.cpython-310.pyc").write_bytes(b"")
    pip("wheel", copy, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "dist")
    [built] = (folder / "dist").iterdir()
    return built


def test_it_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    assert wheel.stat().st_size < 200_000
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    modules = {
        f"{package.name}/{path.relative_to(package).as_posix()}"
        for package in (ROOT / "kernels" / "stochastic_pooling", ROOT / "cnnsp")
        for path in package.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {"stochastic_pooling/py.typed", "cnnsp/py.typed"} < modules
    about = {
        f"{information}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    }
    assert names == modules | about


def test_it_is_used_alone_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("STOCHASTIC_POOLING_BACKEND", None)
    printed = run(sys.executable, "-c", USE, cwd=elsewhere, env=environment)
    assert [Path(line).resolve().parent for line in printed.splitlines()] == [
        installed.resolve() / "stochastic_pooling",
        installed.resolve() / "cnnsp",
    ]
