"""Tables as Markdown for people and CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers; a float is shown with three digits after the point, in full in CSV; None is empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: a row of {len(row)} under {len(self.columns)} columns")


def goals_table(title: str, goals: Iterable[tuple[str, str, bool]]) -> Table:
    """What was meant to be reached, what came out, and whether it was."""
    rows = [[goal, figure, "yes" if reached else "no"] for goal, figure, reached in goals]
    return Table(title, ("goal", "came out", "reached"), rows)


def to_markdown(table: Table) -> str:
    """The title and a pipe table; columns that hold numbers are aligned to the right."""
    numeric = [
        any(isinstance(row[index], int | float) for row in table.rows) for index in range(len(table.columns))
    ]
    lines = [_line(table.columns), _line(["---:" if right else "---" for right in numeric])]
    lines += [_line([_shown(value) for value in row]) for row in table.rows]
    return f"**{table.title}**\n\n" + "\n".join(lines) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """All tables, each after a line with its title, an empty line between them (RFC 4180)."""
    text = io.StringIO()
    writer = csv.writer(text)
    for index, table in enumerate(tables):
        if index:
            writer.writerow([])
        writer.writerow([table.title])
        writer.writerow(table.columns)
        writer.writerows(["" if value is None else value for value in row] for row in table.rows)
    return text.getvalue()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(value: str | int | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
