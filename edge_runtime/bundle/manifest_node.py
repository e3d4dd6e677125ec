"""Reads an untrusted manifest field by field: every error names the place, its value and what is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from edgestill.runtime.errors import BundleError

_MISSING: Any = object()


@dataclass(frozen=True)
class Node:
    """A value in the manifest with the place where it stands, for error messages."""

    value: Any
    where: str

    def get(self, key: str, default: Any = _MISSING) -> Node:
        mapping = self.expect(dict)
        if key not in mapping and default is _MISSING:
            raise BundleError(f"{self.where}: field {key!r} is missing", "export the bundle again")
        return Node(mapping.get(key, default), f"{self.where}{'.' if ':' in self.where else ': '}{key}")

    def expect(self, kind: type) -> Any:
        if type(self.value) is not kind:
            raise BundleError(
                f"{self.where}: {self.value!r:.80} is not a {kind.__name__}", "export the bundle again"
            )
        return self.value

    def entries(self) -> list[tuple[str, Node]]:
        return [(key, self.get(key)) for key in self.expect(dict)]

    def items(self) -> list[Node]:
        return [Node(value, f"{self.where}[{index}]") for index, value in enumerate(self.expect(list))]

    def text(self) -> str:
        return self.expect(str)

    def number(self) -> float:
        if type(self.value) not in (int, float) or not abs(self.value) < 1e308:
            raise BundleError(f"{self.where}: {self.value!r:.80} is not a finite number")
        return float(self.value)

    def size(self, at_least: int = 0) -> int:
        if not at_least <= self.expect(int) <= 2**53:
            raise BundleError(f"{self.where}: {self.value} is not a size of at least {at_least}")
        return self.value

    def optional_size(self, key: str) -> int | None:
        node = self.get(key, None)
        return None if node.value is None else node.size()

    def one_of(self, choices: tuple[Any, ...]) -> Any:
        if self.value not in choices:
            raise BundleError(f"{self.where}: {self.value!r:.80} is none of {', '.join(map(str, choices))}")
        return self.value

    def matching(self, pattern: re.Pattern[str]) -> str:
        if not pattern.fullmatch(self.text()):
            raise BundleError(f"{self.where}: {self.value!r:.80} has the wrong form")
        return self.value

    def file_name(self) -> str:
        return self.check_file_name(self.text())

    def check_file_name(self, name: str) -> str:
        """A relative path with forward slashes that stays inside the bundle."""
        path = PurePosixPath(name)
        if (
            not name
            or "\\" in name
            or ":" in name
            or "\0" in name
            or path.is_absolute()
            or ".." in path.parts
            or str(path) != name
            or name in (".", "manifest.json")
        ):
            raise BundleError(
                f"{self.where}: {name!r} is not a file inside the bundle",
                "do not use this bundle: somebody may have tampered with it",
            )
        return name
