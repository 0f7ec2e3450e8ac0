"""Sphinx's configuration; ``sphinx-build -W docs docs/_build`` makes the pages."""

import importlib.metadata
import os

project = "optax-adamod"
author = "The optax-adamod authors"
copyright = "The optax-adamod authors"  # noqa: A001
release = version = importlib.metadata.version("optax-adamod")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
nitpicky = True
# Names of other projects, which are links where there is a network.
nitpick_ignore_regex = [(r"py:.*", r"(collections|flax|jax|numpy|np|optax)\..*")]
if os.environ.get("ONLINE"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
    }

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # Args says it, in words
add_module_names = False
python_maximum_signature_line_length = 80
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"  # as JAX's and Optax's pages
html_title = f"optax-adamod {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}
html_show_sourcelink = False
linkcheck_timeout = 30
