"""Where programs keep what belongs to their user, as the XDG base directory specification says."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """XDG_DATA_HOME if it is an absolute path, else ~/.local/share."""
    given = Path(os.environ.get("XDG_DATA_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".local" / "share"
