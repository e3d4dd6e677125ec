"""A coordinator that kills itself (SIGKILL) before or after its N-th durable write; run by test_coordinator_crash.

python -m tests.support.coordinator_crash_process FOLDER N before|after
Every acknowledgement is appended to FOLDER/acknowledged before anything else happens.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.support.coordinator_crash import Faults, crashing_service, play


def main() -> None:
    folder, number, when = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    faults = Faults(number, when, lambda: os.kill(os.getpid(), signal.SIGKILL))
    play(crashing_service(folder, faults), folder)
    print(faults.writes)


if __name__ == "__main__":
    main()
