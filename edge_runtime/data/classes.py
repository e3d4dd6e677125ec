"""Class names: the data's classes find their outputs by name, never by their place in a list.

Names are equal as they stand, or but for upper and lower case, spaces at either end and the way accents are encoded
(macOS decomposes them), where that is unambiguous.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgestill.runtime.data.notice import Notice, Tell
from edgestill.runtime.errors import DataError

METADATA = "class_names"
"""Under which a state file's metadata name the outputs, as a JSON list."""
_SHOWN = 12


@dataclass(frozen=True)
class KnownClasses:
    """What the outputs of a student mean, in their order; `whose` for messages, such as "the bundle leaf-bundle"."""

    names: tuple[str, ...]
    whose: str

    def __bool__(self) -> bool:
        return bool(self.names)


def first_known(*known: KnownClasses | None) -> KnownClasses | None:
    """The first that names any."""
    return next((one for one in known if one), None)


def find_places(own: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """Where each of one's own names stands among the wanted ones; None for those that are not among them."""
    exact = {name: place for place, name in enumerate(wanted)}
    alike, mine = Counter(map(_plain, wanted)), Counter(map(_plain, own))
    by_plain = {_plain(name): place for place, name in enumerate(wanted)}

    def place(name: str) -> int | None:
        if name in exact:
            return exact[name]
        plain = _plain(name)
        return by_plain.get(plain) if alike[plain] == mine[plain] == 1 else None

    return [place(name) for name in own]


def translate(
    labels: np.ndarray, own: Sequence[str], known: KnownClasses, where: str, tell: Tell
) -> np.ndarray:
    """Labels [N], which number `own` names, as numbers of the known names.

    Names without a sample may be unknown. Errors: DataError with both lists.
    """
    used = [int(label) for label in np.unique(labels)]
    if used and not 0 <= used[0] <= used[-1] < len(own):
        wrong = used[0] if used[0] < 0 else used[-1]
        raise DataError(
            f"{where}: label {wrong} has no name: the data name {len(own)} classes: {join_names(own)}",
            f"name all classes of the data, for they are compared with those of {known.whose}",
        )
    found = find_places(own, known.names)
    strangers = [own[label] for label in used if found[label] is None]
    if strangers:
        raise DataError(
            f"{where}: {'class' if len(strangers) == 1 else 'classes'} {join_names(strangers)} not among those of "
            f"{known.whose}; the data's classes: {join_names(own)}; {known.whose} has: {join_names(known.names)}",
            "rename the data's classes, remove what is of no class, or use a student of these classes",
        )
    renamed = {
        own[n]: known.names[p] for n in used if (p := found[n]) is not None and own[n] != known.names[p]
    }
    if renamed:
        pairs = [f"{mine} is {theirs}" for mine, theirs in renamed.items()]
        tell(Notice("classes", f"{where}: classes taken by name: {join_names(pairs)}", {"renamed": renamed}))
    table = np.array([-1 if place is None else place for place in found], np.int64)
    return table[labels]


def names_of_outputs(names: Sequence[str], outputs: int) -> list[str]:
    """A name for each output: its number where it has none, as the data may have had fewer classes."""
    return [*names, *map(str, range(len(names), outputs))][:outputs]


def check_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    """Errors: DataError for names that do not tell classes apart."""
    counts = Counter(names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice or not all(name.strip() for name in names):
        raise DataError(
            f"{what}: {f'{twice[0]!r} names two classes' if twice else 'a class has an empty name'}",
            "give every class a name of its own",
        )
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{what}: a class is called {name!a}, which is not Unicode text", "rename it") from error
    return tuple(names)


def names_as_metadata(names: Sequence[str]) -> dict[str, str]:
    """The entry of a state file's metadata; none where there are no names."""
    return {METADATA: json.dumps(list(names), ensure_ascii=False)} if names else {}


def names_in_metadata(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What `names_as_metadata` wrote; nothing where another hand wrote something else."""
    try:
        names = json.loads(metadata.get(METADATA, "[]"))
    except ValueError:
        return ()
    right = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if right and len(set(names)) == len(names) else ()


def join_names(names: Sequence[str]) -> str:
    """The names in a row, the first dozen of many."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()
