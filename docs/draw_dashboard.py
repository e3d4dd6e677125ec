"""Photographs docs/dashboard.png: `.venv/bin/python -m docs.draw_dashboard http://127.0.0.1:8000/tasks/demo`, of a
coordinator that serves, as `edgestill demo --keep` leaves one running. Needs Chromium."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from tests.support.chromium import chromium

WIDTH, HEIGHT = 1040, 790


def photograph(url: str, path: Path) -> None:
    """Writes the upper part of the page as a PNG of few colours."""
    with chromium() as browser:
        browser.open(url, WIDTH, HEIGHT)
        browser.evaluate("document.documentElement.style.scrollbarWidth = 'none'")
        browser.screenshot(path)
    whole = Image.open(path)
    part = whole.crop((0, 0, whole.width, HEIGHT))
    part.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)


if __name__ == "__main__":
    photograph(sys.argv[1], Path(__file__).with_name("dashboard.png"))
