"""The documentation names tests, files and headings that exist; its pictures can be made."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from cnnsp.results import pictures

ROOT = Path(__file__).resolve().parents[1]
# Those of the project, not of a virtual environment or of a tool's cache inside it.
PAGES = sorted(
    page for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")] if page.parent.name[0] != "."
)
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def test_named_tests_exist():
    files = {path.name: path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    defined = {
        name: {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
        for name, text in files.items()
    }
    everywhere = 0
    for page in PAGES:
        text = page.read_text("utf-8")
        named = re.findall(r"`(?:(?:tests/)?(test_\w+\.py)(?:::)?)?(test_\w+)?`", text)
        named = [(file, test) for file, test in named if file or test]
        everywhere += len(named)
        for file, test in named:
            assert not file or file in files, (page.name, file)
            found = [tests for name, tests in defined.items() if file in ("", name)]
            assert not test or any(test in tests for tests in found), (page.name, test)
    assert everywhere > 50


def test_links_lead_somewhere():
    """Those to files of the project, and to headings in them."""
    links = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"\w+:", target):  # https:, mailto:
                continue
            links += 1
            name, _, heading = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not heading or heading in anchors(path), f"{page.name}: {target}"
    assert links > 10


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_github_s(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What `fuse` saves\n\n## On a CPU, 3 / 4\n\n```\n# no heading\n```\n", "utf-8"
    )
    assert anchors(page) == {"what-fuse-saves", "on-a-cpu-3--4"}


def test_the_recipe_for_a_variant_names_what_there_is():
    """Functions, classes and constants that stand in the code, but for those it tells to write."""
    text = (ROOT / "docs" / "variants.md").read_text("utf-8")
    sources = [*ROOT.glob("kernels/stochastic_pooling/**/*.py"), *ROOT.glob("tests/*.py")]
    trees = [ast.parse(path.read_text("utf-8")) for path in [*sources, *ROOT.glob("bench/*.py")]]
    defined = {
        node.name if isinstance(node, DEFINITIONS) else node.id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, DEFINITIONS)
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    }
    named = set(re.findall(r"`(_\w+|[a-z]+(?:_[a-z0-9]+)+|[A-Z]+_[A-Z]+)`", text))
    new = {name for name in named if "squares" in name.lower() or "square" in name.lower()}
    assert len(named - new) > 20
    assert named - new - defined == set()


def test_the_study_says_what_its_tables_say():
    text = " ".join((ROOT / "docs" / "study.md").read_text("utf-8").split())
    draws = pd.read_csv(ROOT / "docs" / "study" / "draws.csv")
    rows = draws[draws["recipe"] == "best"]
    means = rows.pivot_table(index="pool", columns="method", values="accuracy")
    gain = means["16 views"] - means["one pass"]
    assert f"Views recognise {gain.min():.1f} to {gain.max():.1f} points more" in text
    noise = pd.read_csv(ROOT / "docs" / "study" / "noise.csv")
    own = 100 * noise[noise["recipe"] == "digits"].groupby("pool")["own"].mean()
    assert f"its draws add {own[1]:.0f} and {own[2]:.0f} % of the signal's variance" in text


def test_the_study_s_labels_lie_within_their_axes():
    figure = runpy.run_path(str(ROOT / "docs" / "study" / "report.py"))["why"]()
    pictures.pixels(figure)
    for axis in figure.axes:
        for text in axis.texts:
            assert text.get_window_extent().y1 < axis.bbox.y1


@pytest.mark.slow
def test_pictures_are_made(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    importlib.import_module("pictures").main(tmp_path)
    for name in ("pooling.png", "kernels.png"):
        committed = ROOT / "docs" / name
        assert committed.stat().st_size < 200_000
        with Image.open(tmp_path / name) as made, Image.open(committed) as shown:
            assert made.size == shown.size
