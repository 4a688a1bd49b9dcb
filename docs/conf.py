"""Settings of the documentation site: Sphinx with MyST and furo."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from slora_flwr import __version__

project = "slora-flwr"
project_copyright = "the slora-flwr authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "generated",
]
exclude_patterns = ["_build"]
nitpicky = True
default_role = "literal"

myst_enable_extensions = ["colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
# What docstrings and signatures name of other projects, which this site cannot link to,
# and of this one's inside, which no user calls.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = "slora-flwr"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False

# `-b linkcheck` checks links within the site; those to other sites need a network.
linkcheck_ignore = ["https?://"]
