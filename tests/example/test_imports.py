"""The two packages' import rule, checked in their source."""

import ast
from pathlib import Path

import pytest

import gradsurgery
import slam_ags_example

PUBLIC_MODULES = {"gradsurgery", "gradsurgery.methods", "gradsurgery.kernels"}


def sources(package):
    folder = Path(package.__file__).parent
    return sorted(folder.rglob("*.py"))


def imports(path):
    """(module, name) of each import of a file; name is None for a plain ``import module``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                ("." * node.level + (node.module or ""), alias.name) for alias in node.names
            )


def of_package(module, package):
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", sources(slam_ags_example), ids=lambda path: path.name)
def test_the_example_imports_public_names_of_the_library_alone(path):
    for module, name in imports(path):
        if not of_package(module, "gradsurgery"):
            continue
        assert module in PUBLIC_MODULES, f"{path.name} imports {module}"
        public = __import__(module, fromlist=["__all__"]).__all__
        assert name is None or name in public, f"{path.name} imports {name} from {module}"


@pytest.mark.parametrize("path", sources(gradsurgery), ids=lambda path: path.name)
def test_the_library_does_not_know_the_example(path):
    assert not [module for module, _ in imports(path) if of_package(module, "slam_ags_example")]


def test_both_packages_were_looked_at():
    assert len(sources(slam_ags_example)) > 10
    assert any(
        of_package(module, "gradsurgery")
        for path in sources(slam_ags_example)
        for module, _ in imports(path)
    )


@pytest.mark.parametrize("path", sources(slam_ags_example), ids=lambda path: path.name)
def test_a_files_first_line_says_what_lives_in_it(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith('"""')
    assert len(first) > 20
