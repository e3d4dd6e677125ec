"""What an experiment makes of its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgestill.benchmarks.experiments.figures import Figure
from edgestill.benchmarks.experiments.tables import Table
from edgestill.runtime.errors import EdgestillError


@dataclass(frozen=True)
class Report:
    """Tables and figures for people; `summary`, JSON values, for scripts. `notes` are Markdown paragraphs before the
    tables: what was chosen, and how."""

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def require_one_each(records: Iterable[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Errors: EdgestillError where two records agree in the settings `names`, by which a report tells runs apart: one
    of them is of an older protocol, or of what an older tuning chose."""
    seen: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in records:
        place = tuple(record["settings"].get(name) for name in names)
        other = seen.setdefault(place, record)
        if other is not record:
            what = ", ".join(
                f"{name} {value}" for name, value in zip(names, place, strict=True) if value is not None
            )
            raise EdgestillError(
                f"the records hold two runs of {what} with other settings: keys {other.get('key')} and "
                f"{record.get('key')}",
                "delete the line of the one that no longer counts, or start anew with another --output",
            )
