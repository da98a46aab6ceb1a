"""Sphinx configuration. Warnings are errors in CI: `sphinx-build -W docs docs/_build`."""

project = "gradsurgery"
author = "the gradsurgery authors"
copyright = "2026, the gradsurgery authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
myst_heading_anchors = 2
