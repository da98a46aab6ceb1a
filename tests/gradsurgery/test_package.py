"""The package as such: names, version, typing marker, imports, and what importing costs."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import gradsurgery

PACKAGE = Path(gradsurgery.__file__).parent


def imports_of(path: Path) -> set[str]:
    """Top-level names of everything that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_public_names_and_version() -> None:
    assert set(gradsurgery.__all__) <= set(dir(gradsurgery))
    assert gradsurgery.__version__ == importlib.metadata.version("gradsurgery")
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_the_library_depends_on_torch_alone(path: Path) -> None:
    allowed = {"torch", "gradsurgery"} | set(sys.stdlib_module_names)
    if path.name.startswith("triton_"):
        # Imported only where tensors are on CUDA; comes with torch there.
        allowed |= {"triton"}
    if path.name == "_plot.py":
        # Inside of `plot`, which says what to install.
        allowed |= {"matplotlib"}
    assert imports_of(path) <= allowed


def test_the_one_way_of_data() -> None:
    """kernels know of nothing above them, methods and task_gradients of kernels alone."""
    for folder, allowed in (
        ("kernels", {"gradsurgery.kernels"}),
        ("methods", {"gradsurgery.methods", "gradsurgery.kernels"}),
    ):
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradsurg"):
                    assert any((node.module or "").startswith(a) for a in allowed), path
    text = (PACKAGE / "task_gradients.py").read_text()
    assert "gradsurgery.methods" not in text
    assert "gradsurgery.surgery" not in text


def test_import_adds_under_a_tenth_of_a_second() -> None:
    code = (
        "import time, torch; start = time.perf_counter(); import gradsurgery; "
        "print(time.perf_counter() - start)"
    )
    # Compiled once, as in any installation: the first run writes the bytecode.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    runs = [
        float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
        for _ in range(4)
    ]
    assert statistics.median(runs[1:]) < 0.1
