"""Tables on a terminal, wide enough to hold what they say where it is not one."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

WIDE = 140


class Table(NamedTuple):
    """The heads of columns, and rows of as many cells."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def show(table: Table) -> str:
    """Return a table as text: cells are what they say, without markup."""
    found = RichTable(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for head in table.heads:
        found.add_column(head, overflow="fold")
    for row in table.rows:
        found.add_row(*(Text(str(cell)) for cell in row))
    text = io.StringIO()
    Console(file=text, width=WIDE, color_system=None).print(found)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
