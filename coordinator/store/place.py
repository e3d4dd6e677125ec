"""Where a coordinator keeps things, in words that may be shown; and what is a backup and none of these places."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from edgestill.runtime.errors import UsageError

BACKUP_MARK = "edgestill-backup"
"""The file that tells the folder of a backup from a coordinator's, which holds the same otherwise."""
_SECRET = re.compile("pass(word|wd)?$|secret|token", re.IGNORECASE)
_STARS = "***"


def without_secrets(place: str) -> str:
    """A path or URL with `***` for passwords, be they before the host or in the query."""
    if "://" not in place:
        return place
    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        return re.sub(r"://.*@|\?.*", lambda found: f"{found[0][:3]}{_STARS}@" if found[0][0] == ":" else "", place)
    secrets = {name: _STARS for name in url.query if _SECRET.search(name)}
    if url.password is None and not secrets:
        return place
    shown = url.update_query_dict(secrets).render_as_string(hide_password=True)
    return shown.replace("%2A%2A%2A", _STARS)


def check_no_backup(folder: Path) -> None:
    """Errors: UsageError for the folder of a backup, which nobody works on."""
    if (folder / BACKUP_MARK).exists():
        raise UsageError(
            f"{folder} is a backup",
            f"`edgestill restore {shlex.quote(str(folder))} --data-dir NEW_DIR` makes a coordinator's folder of it",
        )
