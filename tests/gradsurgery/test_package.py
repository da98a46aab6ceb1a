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
    if path.name == "plots.py":
        # Inside of `plot`, which says what to install.
        allowed |= {"matplotlib"}
    assert imports_of(path) <= allowed


# A package may import from those before it, and from itself.
HOUSE = (
    ("_warn",),
    ("distributed",),
    ("kernels",),
    ("gradients",),
    ("methods", "options"),
    ("report",),
    ("weights",),
    ("backward",),
    ("aggregate", "optimizer"),
    ("_probe",),
    ("diagnosis",),
)


def modules() -> dict[str, set[str]]:
    """Module of the library -> the modules of it that it imports anywhere, also in functions."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found[name] |= {n for n in names if n.split(".")[0] == "gradsurgery"}
    return {
        name: {other for other in others if other in found and other != name}
        for name, others in found.items()
    }


def test_data_flows_one_way() -> None:
    """No module knows of one above it."""
    floor = {name: level for level, names in enumerate(HOUSE) for name in names}
    for module, imported in modules().items():
        if module == "gradsurgery":
            continue
        own = module.split(".")[1]
        for other in imported - {"gradsurgery"}:
            theirs = other.split(".")[1]
            assert theirs == own or floor[theirs] < floor[own], (module, other)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: others - {"gradsurgery"} for name, others in modules().items()}
    # A package's own __init__ runs first whatever is imported from it.
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name] - packages:
                walk(other, (*path, name))
            done.add(name)

    for name in graph.keys() - packages:
        walk(name, ())


def test_the_house_stays_small() -> None:
    private = [p.name for p in PACKAGE.glob("_*.py") if p.name != "__init__.py"]
    assert len(private) <= 3, private
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 350, (path, lines)


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
