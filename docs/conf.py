"""Sphinx's configuration: ``sphinx-build -W --keep-going docs build/docs`` builds the site, without a network."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
# This checkout's package, whatever is installed.
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

import leakage  # noqa: E402 (after its path)

project = "leakage"
author = "The leakage authors"
project_copyright = author
version = release = leakage.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "mathml", "room"]
exclude_patterns = ["_extensions"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
# Links to headings within a page and between pages, as GitHub makes them.
myst_heading_anchors = 4
# Notebooks keep their outputs; a test runs them.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
# Longer signatures have a line for each parameter.
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # else attributes that are properties appear twice
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "leakage"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
# Where GitHub builds the site, pages link to their source.
if repository := os.environ.get("GITHUB_REPOSITORY"):
    html_theme_options = {
        "source_repository": f"{os.environ['GITHUB_SERVER_URL']}/{repository}/",
        "source_branch": "main",
        "source_directory": "docs/",
    }
copybutton_exclude = ".linenos, .gp, .go"
