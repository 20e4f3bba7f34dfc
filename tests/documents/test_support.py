"""The generated page of the docs says what the backends declare today."""

import pathlib
import re
import sys

import pytest

import ejk

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import support_table

pytestmark = pytest.mark.fast


def test_support_page_is_fresh(jax_triton):
    page = support_table.PAGE.read_text(encoding="utf-8")
    assert page == support_table.generate(), "stale: run `python docs/support_table.py`"


def test_check_fails_on_a_stale_page(tmp_path, monkeypatch):
    monkeypatch.setattr(support_table, "PAGE", tmp_path / "support.md")
    monkeypatch.setattr(support_table, "generate", lambda: "fresh\n")
    with pytest.raises(SystemExit, match=r"support\.md is stale: run"):
        support_table.main(["--check"])
    support_table.main([])
    support_table.main(["--check"])
    assert support_table.PAGE.read_text(encoding="utf-8") == "fresh\n"


def test_reference_lists_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^   ejk\.(\w+)$", page, re.MULTILINE))
    assert listed == {name for name in vars(ejk) if name[0].isupper() or _is_function(name)}
    listed = set(re.findall(r"^   ejk\.paging\.(\w+)$", page, re.MULTILINE))
    assert listed == {name for name in vars(ejk.paging) if name[0].isupper()}


def _is_function(name):
    return callable(getattr(ejk, name)) and not name.startswith("_")
