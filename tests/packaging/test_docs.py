"""The code in the README and the docs runs, and every link in them leads to a file or heading that exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from subnets.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = (
    "quickstart", "masking", "discovery", "subnets", "transfer", "neurosurgeon", "looking", "methods", "clustering",
    "kinds", "protocols", "mask_methods",
)  # fmt: skip
NEEDS = {"clustering.md": "sklearn"}  # pages that run where an optional package is installed
RUNS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]


@pytest.mark.parametrize("page", RUNS, ids=lambda page: page.name)
def test_python_blocks_run_top_to_bottom_and_then_the_commands(page, tmp_path, monkeypatch):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "docs"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    for command in re.findall(r"^\$ subnets (.*)$", page.read_text(), flags=re.MULTILINE):
        assert main(shlex.split(command)) == 0, command


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file.read_text()), f"{page.name} links to {target}"


def test_the_files_that_people_look_for_are_there():
    for name in ("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "constraints.txt"):
        assert (ROOT / name).stat().st_size > 0


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES[2:] if page.name != "README.md" and f"({page.name}" not in index]
    assert not missing, f"docs/README.md names no {missing}"
