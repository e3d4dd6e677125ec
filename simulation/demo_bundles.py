"""The demo's students as bundles that the package carries; `python -m edgestill.simulation.demo_bundles` exports them.

`make wheels` runs that, so `edgestill demo` needs no PyTorch where a wheel is installed. In git there are none.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files("edgestill.simulation"))) / "carried"
"""Where the package has them, one `.zip` a student, and what `make demo-seeds` recorded."""


def carried(names: Sequence[str]) -> bool:
    """Whether the package has a bundle of every student."""
    return all((FOLDER / f"{name}.zip").is_file() for name in names)


def unpack(names: Sequence[str], output: Path) -> None:
    """Puts each student's bundle into `output`/name, in the place of what was there."""
    for name in names:
        shutil.rmtree(output / name, ignore_errors=True)
        shutil.unpack_archive(FOLDER / f"{name}.zip", output / name)


def write(folder: Path) -> None:
    """Exports the demo's students, for `native` alone. Errors: DemoFailed."""
    from edgestill.simulation.demo import STUDENTS, DemoSettings, export_words
    from edgestill.simulation.demo_commands import Commands
    from edgestill.simulation.seeds import CARRIED_RECORDS, CHECKOUT_RECORDS

    folder.mkdir(exist_ok=True)
    show, settings = Commands(sys.stderr), DemoSettings(output=folder)
    show.run_beside([export_words(student, settings, packed=True) for student in STUDENTS])
    shutil.copyfile(CHECKOUT_RECORDS, folder / CARRIED_RECORDS.name)


if __name__ == "__main__":
    write(FOLDER)
