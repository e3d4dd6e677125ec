"""What an experiment makes of its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.experiments.figures import Figure
from benchmarks.experiments.tables import Table


@dataclass(frozen=True)
class Report:
    """Tables and figures for people; `summary`, JSON values, for scripts. `notes` are Markdown paragraphs before the
    tables: what was chosen, and how."""

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
