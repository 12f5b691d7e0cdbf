"""Flags in `-h` stand whole, however narrow the terminal: other columns of the table get narrower."""

from __future__ import annotations

from typing import Any

import typer.rich_utils
from rich.table import Table

_FOLDED = 2  # columns at the end: values and their meaning


class _WholeFlags(Table):
    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*cells, **options)
        for column in self.columns[:-_FOLDED]:
            column.no_wrap = True


def show_whole_flags() -> None:
    """Holds for all commands of this process."""
    typer.rich_utils.Table = _WholeFlags  # type: ignore[attr-defined]
