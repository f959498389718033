"""What the site is made of: links that lead somewhere, in the repository too, and a reference without gaps."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import jbn

markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")

ROOT = Path(__file__).parents[1]
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
PAGES = sorted(path for path in TEXTS if "_build" not in path.parts)


def tokens(path):
    """Return the parts of a file, or of the cells of a notebook, one after the other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return markdown.parse(text)


def anchors(path):
    """Return the anchors of the headings of a file, as GitHub and the site name them."""
    names, found = [], Counter()
    parts = tokens(path)
    for part, inside in pairwise(parts):
        if part.type == "heading_open":
            words = "".join(child.content for child in inside.children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            names.append(f"{slug}-{found[slug]}" if found[slug] else slug)
            found[slug] += 1
    return names


def targets(path):
    """Return where the links and images of a file lead."""
    inline = [child for part in tokens(path) for child in part.children or ()]
    return [child.attrGet("href") or child.attrGet("src") for child in inline if child.type in ("link_open", "image")]


def links(path):
    """Return where the links and images of a file lead, but for those out of the repository."""
    return [unquote(target) for target in targets(path) if not re.match(r"\w+:", target)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_sections_that_are_there(path):
    for target in links(path):
        name, _, section = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not section or section in anchors(file), target


ADDRESS = re.compile(r"\b(?:https?|ftp)://[^\s)>\]\"'`]*")
PLACEHOLDERS = re.compile(r"OWNER|NAME|TODO|FIXME|XXX|[<>{}]|\.\.|localhost|\bexample\.", re.IGNORECASE)
PROGRAMS = [path for folder in ("jbn", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("path", [*PAGES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_other_sites_are_whole_and_no_placeholders(path):
    """Whether they are answered `sphinx -b linkcheck` says, which needs a network."""
    text = path.read_text(encoding="utf-8")
    found = ADDRESS.findall(text)
    if path.suffix != ".py":
        found += [target for target in targets(path) if re.match(r"\w+:", target)]
    for url in found:
        url = url.rstrip(".,;:\\")
        parts = urlsplit(url)
        assert parts.scheme == "https", url
        assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), url
        assert not PLACEHOLDERS.search(url), url


def test_each_public_name_is_in_the_reference_once():
    modules = {"jbn": jbn}
    for name in ("linen", "nnx", "typing"):
        modules[f"jbn.{name}"] = pytest.importorskip(f"jbn.{name}")
    public = {f"{module}.{name}" for module, has in modules.items() for name in has.__all__}
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    directive = r"^\.\. (?:auto(?:class|data|function)|py:class):: (jbn(?:\.linen|\.nnx|\.typing)?\.\w+)$"
    shown = Counter(re.findall(directive, text, re.MULTILINE))
    assert public - set(shown) == set()
    assert set(shown) - public == set()
    assert {name for name, times in shown.items() if times > 1} == set()
