"""What a coordinator gives a device to take part with, asked for and downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.runtime.device.client import Coordinator, Refused
from edgestill.runtime.device.journal import Keep
from edgestill.runtime.device.local_training import EXCHANGES


@dataclass(frozen=True)
class Assignment:
    """What the coordinator gave this device to take part with; paths of downloaded blobs."""

    task: Mapping[str, Any]
    bundle_path: Path
    transfer_path: Path | None
    bytes_down: int
    digests: frozenset[str]


def fetch_assignment(coordinator: Coordinator, keep: Keep) -> Assignment:
    """Asks for the assignment and downloads its bundle and transfer set, where they are not here already.

    Errors: Refused (`no_fitting_student`), Unreachable, DamagedBlob; Refused too for an answer out of its form.
    """
    answer = coordinator.assignment()
    try:
        task, student = answer["task"], answer["student"]
        transfer = task.get("transfer")
        wanted = [(str(student["bundle"]), int(student["size_bytes"]))]
        if transfer is not None:
            wanted.append((str(transfer["blob"]), int(transfer["size_bytes"])))
        if task["exchange"] not in EXCHANGES:
            raise ValueError(f"exchange {task['exchange']!r}")
        names = task.get("class_names") or []
        if not (isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)):
            raise ValueError(f"class names {str(names)[:70]}")
        if len(set(names)) < len(names):
            raise ValueError(f"class names that are not different: {str(names)[:70]}")
        for digest, size_bytes in wanted:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef") or size_bytes < 1:
                raise ValueError(f"blob {digest[:70]!r} of {size_bytes} bytes")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            f"the assignment is not readable: {error!r}", "is the coordinator of this version?"
        ) from error
    paths, bytes_down = [], 0
    for digest, size_bytes in wanted:
        target = keep.blob_path(digest)
        bytes_down += 0 if target.exists() else size_bytes
        paths.append(coordinator.blob(digest, size_bytes, target))
    return Assignment(
        task,
        paths[0],
        paths[1] if transfer is not None else None,
        bytes_down,
        frozenset(d for d, _ in wanted),
    )
