"""How Sphinx makes a site of these pages: `pip install ".[docs]" && sphinx-build -W docs site`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import hybridkv

project = "hybridkv"
author = "the hybridkv authors"
with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
    release = version = tomllib.load(file)["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["measurements", "__pycache__"]
root_doc = "index"
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # blocks that show both a command and what it prints

html_theme = "furo"
html_title = f"hybridkv {version}"
html_show_copyright = html_show_sourcelink = False

autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_member_order = "alphabetical"
napoleon_google_docstring = False
napoleon_use_rtype = False

# The package imports some of its names when they are used; autodoc lists those that are there.
vars(hybridkv).update({name: getattr(hybridkv, name) for name in hybridkv.__all__})
