"""Fills docs/results.md, between its markers, with what the committed records say.

Run: python -m edgestill.benchmarks.results_page

A block starts with `<!-- NAME:begin -->` and ends with `<!-- NAME:end -->`, NAME an experiment. What stands around the
blocks is written by hand and names no figure, so that no figure on the page can be older than its record.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from edgestill.benchmarks.experiments import EXPERIMENTS
from edgestill.benchmarks.experiments.grid import read_records
from edgestill.benchmarks.reproduce import COMMITTED, describe_report, load_experiment
from edgestill.runtime.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
BLOCK = re.compile(r"<!-- (?P<name>[a-z-]+):begin -->\n.*?<!-- (?P=name):end -->", re.DOTALL)


def fill(page: str, folder: Path = COMMITTED) -> str:
    """The page with every block made anew from the records in `folder`. Errors: ValueError for a name unknown."""

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in EXPERIMENTS:
            raise ValueError(f"docs/results.md: no experiment is called {name}")
        experiment = load_experiment(name)
        records = read_records(folder / f"{name}.jsonl", name)
        text = describe_report(experiment.report(records))
        return f"<!-- {name}:begin -->\n{text}<!-- {name}:end -->"

    return BLOCK.sub(block, page)


def main() -> int:
    write_atomically(PAGE, [fill(PAGE.read_text(encoding="utf-8")).encode()])
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
