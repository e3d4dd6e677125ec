"""Files that are replaced atomically: what killed writers left is removed, what others may still write is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgestill.runtime.files import write_atomically

DAY_S = 86_400


def make_old(path: Path, age_s: float) -> None:
    moment = time.time() - age_s
    os.utime(path, (moment, moment))


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_what_a_killed_writer_left_goes_with_a_later_write(tmp_path: Path) -> None:
    target = tmp_path / "state.safetensors"
    code = (
        "import os, signal, sys; from pathlib import Path; from edgestill.runtime.files import write_atomically\n"
        "def chunks():\n    yield b'half'\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), chunks())"
    )
    killed = subprocess.run([sys.executable, "-c", code, target], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    write_atomically(target, [b"whole"])
    assert left.exists()  # for all that this writer knows, the other one is at work
    make_old(left, 3700)
    write_atomically(target, [b"whole again"])
    assert [*tmp_path.iterdir()] == [target] and target.read_bytes() == b"whole again"


def test_nothing_but_stale_temporary_files_of_the_same_target_is_removed(tmp_path: Path) -> None:
    others = (".a.b.abcd1234.partial", ".b.abcd1234.partial", "a.partial", ".a.partial", ".a.abcd1234.part")
    for name in (*others, ".a.abcd1234.partial"):
        (tmp_path / name).touch()
        make_old(tmp_path / name, DAY_S)
    (tmp_path / ".a.folder12.partial").mkdir()
    make_old(tmp_path / ".a.folder12.partial", DAY_S)
    (tmp_path / ".a.wxyz5678.partial").touch()  # of a writer at work
    write_atomically(tmp_path / "a", [b"new"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, ".a.folder12.partial", ".a.wxyz5678.partial", "a"}
