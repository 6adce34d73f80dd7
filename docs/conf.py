"""Configuration of the documentation: `make docs`."""

import bce_ext

SOURCE = "https://github.com/bce-ext/bce_ext"

project = "bce_ext"
author = "The bce_ext authors"
copyright = "2026, the bce_ext authors"
version = release = bce_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# [pack.h](source:csrc/cpu/pack.h) is a file of the repository.
myst_url_schemes = {"http": None, "https": None, "source": f"{SOURCE}/blob/main/{{{{path}}}}"}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
napoleon_custom_sections = ["Shape"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"bce_ext {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"source_repository": SOURCE, "source_branch": "main", "source_directory": "docs/"}
