"""The scripts as modules, so that tests call their `main` in this process, and other processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
# Of another process that uses both packages.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}


def load_script(name: str) -> ModuleType:
    """A fresh module of `scripts/<name>.py`."""
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_code(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """In a process that uses both packages."""
    given = {"env": ENVIRONMENT, "capture_output": True, "text": True, **options}
    return subprocess.run([sys.executable, "-c", code, *arguments], **given)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process in which Triton compiles; this one may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
