"""What the site is made of: links that lead somewhere, drawings that are fresh, types as shown."""

import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from jaxtyping import Float

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import drawings
import links
import reference

pytestmark = pytest.mark.fast
INCLUDED = [ROOT / "docs" / name for name in ("changelog.md", "contributing.md")]
PAGES = [p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if p not in INCLUDED]
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")


def anchors(page: pathlib.Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    if page in INCLUDED:
        page = ROOT / f"{page.stem.upper()}.md"
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return set(slugs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    """Also of the README, which is no page of the site."""
    for target, anchor in LINK.findall(CODE.sub("", page.read_text())):
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_every_page_has_a_place_on_the_site():
    index = (ROOT / "docs" / "index.md").read_text()
    tree = re.findall(r"^(?:[A-Z].* <)?(\w+)>?$", index, re.MULTILINE)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {name: tree.count(name) for name in pages} == dict.fromkeys(pages, 1)


def test_drawings_are_fresh(tmp_path, monkeypatch):
    drawings.main(["--check"])
    monkeypatch.setattr(drawings, "HERE", tmp_path)
    drawings.main([])
    (tmp_path / "drawing_grid.svg").write_text("old")
    with pytest.raises(SystemExit, match=r"drawing_grid\.svg is stale"):
        drawings.main(["--check"])


def test_dead_links_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y"></a><a href="#x"></a>')
    (tmp_path / "b.html").write_text('<p id="y"><img src="no.svg"><a href="a.html#no"></a>')
    assert links.dead_links(tmp_path) == ["b.html: no.svg", "b.html: a.html#no"]


def attend(
    query: Float[jax.Array | np.ndarray, "rows heads"], scale: float | np.floating | None = None
) -> tuple[jax.Array, jax.Array]: ...


def test_signatures_show_axes_and_plain_numbers():
    shown = reference.signature(None, "function", "attend", attend, None, "()", None)
    arguments = "(query: Float['rows, heads'], scale: float | None = None)"
    assert shown == (arguments, "tuple[Array, Array]")


def test_indented_lines_after_a_colon_are_code():
    lines = ["With `n`:", "", "    l = n", "", "Args:", "    n: a number."]
    reference.formulas(None, "function", "attend", attend, None, lines)
    assert lines[:5] == ["With `n`:", "", ".. code-block:: text", "", "    l = n"]
    assert lines[5:] == ["", "Args:", "    n: a number."]
