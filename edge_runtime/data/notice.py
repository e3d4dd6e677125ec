"""What a person should know of data that were read and can be used: files left out, classes taken by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgestill.runtime.console import printable


@dataclass(frozen=True)
class Notice:
    """`kind` is `skipped`, `classes`, `unnamed`, `frames`, `depth`, `holdout`, `shared` or `student`; `details` are
    JSON values."""

    kind: str
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, **self.details}


Tell = Callable[[Notice], None]


def tell_on_stderr(notice: Notice) -> None:
    """A `Tell` for people."""
    print(f"edgestill: {printable(notice.text)}", file=sys.stderr)


class Notices(list[Notice]):
    """A `Tell` that says everything on stderr and keeps it for `--json`."""

    def __call__(self, notice: Notice) -> None:
        tell_on_stderr(notice)
        self.append(notice)

    def as_json(self) -> list[dict[str, Any]]:
        return [notice.as_json() for notice in self]
