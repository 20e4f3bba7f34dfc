"""The table of `docs/paging.md` is what the results say."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "docs"))
import paging_table


@pytest.mark.fast
def test_the_page_is_as_generated():
    page = paging_table.PAGE.read_text(encoding="utf-8")
    assert page == paging_table.generate(), "stale: run `python docs/paging_table.py`"


def test_check_fails_on_a_stale_page(tmp_path, monkeypatch):
    monkeypatch.setattr(paging_table, "PAGE", tmp_path / "paging.md")
    monkeypatch.setattr(paging_table, "generate", lambda: "fresh\n")
    paging_table.PAGE.write_text("stale\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"paging\.md is stale: run"):
        paging_table.main(["--check"])
    paging_table.main([])
    paging_table.main(["--check"])
