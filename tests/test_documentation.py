"""The table of what works names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_named_tests_exist():
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    defined = {
        name: {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
        for name, text in files.items()
    }
    text = (ROOT / "kernels" / "README.md").read_text()
    named = re.findall(r"`(?:(test_\w+\.py)(?:::)?)?(test_\w+)?`", text)
    named = [(file, test) for file, test in named if file or test]
    assert len(named) > 50
    for file, test in named:
        assert not file or file in files
        if test:
            assert any(test in tests for name, tests in defined.items() if file in ("", name)), test
