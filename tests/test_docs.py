"""Code blocks of README and docs run, and say what the commands say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._functorch import config as functorch_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHED = "# torchrun --nproc-per-node 2"
EVERY_BLOCK = [
    pytest.param(block, id=f"{page.relative_to(ROOT).with_suffix('')}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]
BLOCKS = [each for each in EVERY_BLOCK if not each.values[0].startswith(LAUNCHED)]
IN_PROCESSES = [each for each in EVERY_BLOCK if each.values[0].startswith(LAUNCHED)]


@pytest.fixture
def compiler() -> Iterator[None]:
    """A setting that a block makes goes no further."""
    with functorch_config.patch(donated_buffer=functorch_config.donated_buffer):
        yield


@pytest.mark.usefixtures("compiler")
# Lightning uses what torch deprecates, and advises worker processes where there are more cores.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
# torch.compile looks at .grad of whatever a compiled function is given, also of features.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block: str) -> None:
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("block", IN_PROCESSES)
def test_code_block_runs_in_two_processes(block: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(block)
    launcher = "torch.distributed.run --standalone --nproc-per-node 2"
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr


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
