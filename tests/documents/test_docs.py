"""Examples run as they stand: the README, the documentation, the docstrings."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import ejk

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = ["ejk", "ejk.paging"] + [  # classes say that they are of these
    info.name
    for info in pkgutil.walk_packages(ejk.__path__, "ejk.")
    if not info.name.endswith("kernel")  # Triton's and Pallas' own: no examples, heavy imports
]


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_runs(page, monkeypatch, restored_registry):
    """All Python blocks of a page, in order, in one namespace."""
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        # The line numbers of a traceback are those of the page.
        exec(compile("\n" * line + match.group(1), str(page), "exec"), namespace)


def test_drawn_calls_of_the_pages_have_no_deadline():
    """Hypothesis gives a call 200 ms, unless it is told, as these tests do: too few to compile."""
    text = "".join(page.read_text() for page in PAGES)
    settings = re.findall(r"@(?:hypothesis\.)?settings\((.*)\)", text)
    assert settings and all("deadline=None" in given for given in settings)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name, restored_registry):
    result = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert not result.failed


@pytest.mark.parametrize("name", sorted(set(dir(ejk)) - {"backends"}))
def test_examples_are_in_a_section_that_the_reference_shows_as_code(name):
    docstring = inspect.getdoc(getattr(ejk, name)) or ""
    assert ("\nExamples:\n" in docstring) == (">>>" in docstring)


def test_there_is_something_to_run():
    """Or the tests above would prove nothing."""
    assert BLOCK.search((ROOT / "README.md").read_text())
    assert doctest.DocTestFinder().find(ejk.page_attention)[0].examples
