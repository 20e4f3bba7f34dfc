"""Builds the site of these pages with Sphinx: `make docs`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # of the extension `reference`, and of `ejk`

import ejk

project = "ejk"
version = release = ejk.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "reference",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# Pages are Markdown as GitHub shows it, with GitHub's anchors; a lost link or anchor is a warning.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# Names of `ejk` that nothing documents are warnings; other libraries' are not looked up.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!ejk\.(paging\.)?\w+$).*")]
linkcheck_anchors = False  # pages that are made by scripts have none until they run

html_theme = "sphinx_book_theme"
html_title = "ejk"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "footer_content_items": [],
    "navbar_persistent": [],  # the menu has the search
    "pygments_dark_style": "github-dark",
}
html_copy_source = html_show_sourcelink = html_show_copyright = False
# Formulas need a network, unless this names a copy of MathJax.
if "MATHJAX" in os.environ:
    mathjax_path = os.environ["MATHJAX"]

default_role = "code"  # docstrings have one backtick around code, as Markdown has
autosummary_generate = True
autodoc_typehints = "none"  # it would show every overload; `reference` writes the types
autodoc_inherit_docstrings = False  # `:members:` is what a class documents itself
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 60
copybutton_prompt_text = ">>> "
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True
