"""Code blocks of README and docs run, and say what the commands say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block: str) -> None:
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})


def test_readme_shows_code_and_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(r"```python\n", readme)) >= 1
    commands = re.findall(r"^\$ (.*)$", readme, re.M)
    assert len(commands) == 2
    assert "slam-ags run" in commands[0]
    assert "pytest" in commands[1]


def test_every_method_has_a_row_in_readme() -> None:
    from gradsurgery import methods

    readme = (ROOT / "README.md").read_text()
    for name in methods.available():
        assert f"| `{name}` |" in readme, name
