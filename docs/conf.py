"""The site: ``python -m sphinx -W --keep-going docs docs/_build/html``. It needs no network and runs no notebook."""

import inspect
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax.typing
import typer.main
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature

DOCS = Path(__file__).parent
ROOT = DOCS.parent
os.environ["COLUMNS"] = "80"  # help is as wide, whatever terminal this runs in
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed
# The union that ArrayLike stands for would fill every signature; so it is a name while jbn is imported.
for name in ("ArrayLike", "DTypeLike"):
    setattr(jax.typing, name, type(name, (), {"__module__": "jax.typing"}))

import jbn  # noqa: E402
import jbn.linen  # noqa: E402
import jbn.nnx  # noqa: E402
import jbn.typing  # noqa: E402
from jbn.cli.commands import app as commands  # noqa: E402

project = "jbn"
version = release = jbn.__version__
copyright = "the authors of jbn"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    # MathJax beside the pages and not from a server of others: formulas show without a network and in a folder too, and
    # nobody hears who reads.
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
# What belongs to JAX, Flax and Python is theirs to document, and a type variable has nothing to document; every other
# name of jbn has to be found.
nitpick_ignore_regex = [("py:.*", r"(?!jbn\b).*"), ("py:class", r"jbn\..*\.(\w+T|Tree)")]

myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_space = myst_dmath_allow_digits = False  # as on GitHub: a price is no formula
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4  # a link to a section is the same here and on GitHub
# Until the owner of the repository is named, what links to it leads nowhere; .ci/release refuses while that is so.
linkcheck_ignore = [re.escape(REPOSITORY)] if "/OWNER/" in REPOSITORY else []
suppress_warnings = ["myst.header"]  # the words of the glossary are sections below no other
nb_execution_mode = "off"  # the notebooks have the outputs of the run that their tests repeat

# Signatures have the short names, and link to what they stand for.
autodoc_type_aliases = {name: f"jbn.typing.{name}" for name in jbn.typing.__all__}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a list of attributes, and not a paragraph and a type for each

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"jbn {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The pages that show what stands elsewhere in the repository, where people look for it. Sphinx reads its own folder
# alone, and follows no link out of it: lessons are copied.
SHOWN = {ROOT / f"{name.upper()}.md": DOCS / f"{name}.md" for name in ("performance", "changelog", "contributing")}
SHOWN |= {path: DOCS / "course" / path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
shutil.rmtree(DOCS / "course", ignore_errors=True)
(DOCS / "course").mkdir()
for path in (ROOT / "notebooks").glob("*.ipynb"):
    shutil.copy2(path, DOCS / "course")
# Where the text of a page names one of these, it links to the reference.
NAMES = {f"{module.__name__}.{name}" for module in (jbn, jbn.linen, jbn.nnx, jbn.typing) for name in module.__all__}
# What is written about an alias stands where it is made; Sphinx would show what is said of unions in Python.
MADE = re.findall(r"^from (\S+) import", inspect.getsource(jbn.typing), re.MULTILINE)
WRITTEN = {name: text for made in MADE for (_, name), text in ModuleAnalyzer.for_module(made).find_attr_docs().items()}
# Those that are no words of another meaning need no module before them.
PLAIN = {name for name in jbn.__all__ if "_" in name or name[0].isupper()}


def point(target: str, folder: Path, page: Path) -> str:
    """Return where a link in a file of `folder` leads from `page`: to a page here, or into the repository."""
    path, mark, anchor = target.partition("#")
    file = Path(os.path.normpath(folder / path))
    if not path or ":" in path or not file.exists():
        return target
    file = SHOWN.get(file, file)
    if (file.is_relative_to(DOCS) and file.is_file()) or file.suffix == ".png":
        return os.path.relpath(file, page.parent) + mark + anchor
    return f"{REPOSITORY}/{'tree' if file.is_dir() else 'blob'}/main/{file.relative_to(ROOT)}{mark}{anchor}"


def point_all(text: str, folder: Path, page: Path) -> str:
    """Return a text whose links, which hold in the repository, hold in the site."""
    return re.sub(r"(?<=\]\()[^()\s]+(?=\))", lambda link: point(link[0], folder, page), text)


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Point the links of a page; the page of the command line gets what the commands say of themselves."""
    page = Path(app.env.doc2path(docname))
    source[0] = point_all(source[0], ROOT / "notebooks" if page.suffix == ".ipynb" else page.parent, page)
    if docname == "api/command_line":
        group = typer.main.get_group(commands)
        for name, command in group.commands.items():
            text = command.get_help(group.context_class(command, info_name=f"jbn {name}"))
            source[0] += f"\n## jbn {name}\n\n```text\n{text}\n```\n"


def read_included(app: Sphinx, path: Path, docname: str, source: list[str]) -> None:
    """Point the links of what a page includes."""
    source[0] = point_all(source[0], Path(os.path.normpath(DOCS / path)).parent, Path(app.env.doc2path(docname)))


def link_names(app: Sphinx, page: nodes.document) -> None:
    """Link each public name in the text to its reference, but for those in titles and in links."""
    for literal in list(page.findall(nodes.literal)):
        name = literal.astext().partition("(")[0]
        name = f"jbn.{name}" if name in PLAIN else name
        around = literal.parent
        while around and not isinstance(around, nodes.title | nodes.reference | pending_xref):
            around = around.parent
        if name in NAMES and not around:
            link = pending_xref(refdomain="py", reftype="obj", reftarget=name, refdoc=app.env.docname, refexplicit=True)
            literal.replace_self(link)
            link += literal


def shorten_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Return a signature for people: of a module of NNX, whose class hides it; defaults and arrays by their names."""
    if name == "jbn.nnx.BatchNorm":
        whole = inspect.signature(thing.__init__)
        rest = [parameter for key, parameter in whole.parameters.items() if key != "self"]
        signature = stringify_signature(whole.replace(parameters=rest), unqualified_typehints=True)
        signature = signature.removesuffix(" -> None")
    if signature:
        signature = re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)'?>", r"\1", signature)
        signature = re.sub(r", parent: .*\)$", ")", signature)  # a module of Linen: Flax gives these
        signature = re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"~\1", signature)  # in a union Sphinx leaves it so
        signature = re.sub(r"~numpy\.ndarray\[~?[\w.]+, ~?numpy\.dtype\[~?([\w.]+)\]\]", r"NDArray[\1]", signature)
    return signature, returns


def describe_alias(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Put what is written about an alias in the place of what Python says of its kind."""
    if what == "data" and name.startswith("jbn.typing."):
        lines[:] = WRITTEN[name.removeprefix("jbn.typing.")]


def skip(app: Sphinx, what: str, name: str, member: Any, skipped: bool, options: Any) -> bool | None:
    """Skip fields of named tuples that nobody has written about; None leaves the decision as it is."""
    return True if (getattr(member, "__doc__", "") or "").startswith("Alias for field") else None


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("doctree-read", link_names)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", describe_alias)
    app.connect("autodoc-skip-member", skip)
