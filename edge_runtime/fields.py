"""Reads untrusted JSON field by field: every error names the field, its value and what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from edgestill.runtime.errors import UsageError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Node:
    """A value of the JSON and where it stands, so that errors can say both."""

    value: Any
    where: str

    def error(self, allowed: str) -> UsageError:
        return field_error(self.where, self.value, allowed)

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, Mapping) or not all(isinstance(key, str) for key in self.value):
            raise self.error("an object")
        return dict(self.value)

    def check_fields(self, of: type) -> None:
        known = [entry.name for entry in fields(of)]
        for key in self.mapping():
            if key not in known:
                raise UsageError(
                    f"{self._name(key)}: there is no such field in a task", f"fields here: {', '.join(known)}"
                )

    def get(self, key: str, default: Any = ...) -> Node:
        value = self.mapping().get(key, default)
        if value is ...:
            raise UsageError(
                f"task: {self._name(key)} is missing", "see docs/federation.md for the fields of a task"
            )
        return Node(value, self._name(key))

    def optional(self, key: str, parse: Callable[[Node], Any]) -> Any:
        node = self.get(key, None)
        return None if node.value is None else parse(node)

    def items(self, at_least: int, at_most: int) -> list[Node]:
        if not isinstance(self.value, list | tuple) or not at_least <= len(self.value) <= at_most:
            raise self.error(f"a list of {at_least} to {at_most}")
        return [Node(value, f"{self.where}[{index}]") for index, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.error("text")
        return self.value

    def matching(self, pattern: re.Pattern[str], allowed: str) -> str:
        if not isinstance(self.value, str) or not pattern.fullmatch(self.value):
            raise self.error(allowed)
        return self.value

    def digest(self) -> str:
        return self.matching(_SHA256, "a SHA-256 in 64 lower-case hexadecimal digits")

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.error("true or false")
        return self.value

    def integer(self, least: int, most: int) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not least <= self.value <= most:
            raise self.error(f"a whole number from {least} to {most}")
        return self.value

    def number(self, least: float, most: float, below: bool = False) -> float:
        """From `least` to `most`, or to below `most`; NaN lies nowhere."""
        number = (
            self.value if isinstance(self.value, int | float) and not isinstance(self.value, bool) else None
        )
        if number is None or not least <= number <= most or (below and number == most):
            raise self.error(f"a number from {least:g} to {'below ' if below else ''}{most:g}")
        return float(number)

    def one_of(self, choices: tuple[str, ...]) -> str:
        if not isinstance(self.value, str) or self.value not in choices:
            raise self.error(f"one of {', '.join(choices)}")
        return self.value

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def field_error(where: str, value: Any, allowed: str) -> UsageError:
    text = json.dumps(value, default=str)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return UsageError(f"task: {where or 'the whole'} is {shown}", f"{where or 'a task'} must be {allowed}")
