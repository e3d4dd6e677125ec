"""Writes `coordinator/http/openapi.json`, the API's description: `python -m edgestill.coordinator.http.openapi`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgestill.coordinator.http.app import make_app
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.store.blobs import open_blobs
from edgestill.coordinator.store.database import Store

DESCRIPTION_PATH = Path(__file__).with_name("openapi.json")


def describe() -> str:
    """The description as JSON text; the same code always gives the same."""
    service = Service(Store("sqlite://"), open_blobs("memory://"))
    app = make_app(service, Settings(), loop=False)
    return json.dumps(app.openapi(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    DESCRIPTION_PATH.write_text(describe(), encoding="utf-8")
    print(f"edgestill: wrote {DESCRIPTION_PATH}", file=sys.stderr)
