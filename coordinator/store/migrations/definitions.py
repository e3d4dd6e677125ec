"""What a downgrade takes out of tasks' definitions: an older program refuses a field that it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

_TASKS = sa.table(
    "tasks", sa.column("name", sa.String), sa.column("definition", sa.JSON), sa.column("finished", sa.Boolean)
)


class CannotGoBack(Exception):
    """A task that runs by something that an older version has not: the arguments are its name and the field."""


def take_away(connection: sa.Connection, dispensable: Iterable[str], needed: Iterable[str] = ()) -> None:
    """Removes fields, by their paths as `local.clip_norm`; `needed` ones only where they are null.

    Errors: CannotGoBack where a task that has not ended has a needed one.
    """
    dispensable, needed = tuple(dispensable), tuple(needed)
    for name, definition, finished in connection.execute(sa.select(_TASKS)).all():
        for path in (*dispensable, *needed):
            value = _pop(definition, path)
            if path in needed and value is not None and not finished:
                raise CannotGoBack(name, path)
        connection.execute(sa.update(_TASKS).where(_TASKS.c.name == name).values(definition=definition))


def _pop(holder: Any, path: str) -> Any:
    first, _, rest = path.partition(".")
    if not isinstance(holder, dict) or first not in holder:
        return None
    return _pop(holder[first], rest) if rest else holder.pop(first)
