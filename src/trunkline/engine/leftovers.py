"""What killed processes leave behind."""

from __future__ import annotations

import socket
from pathlib import Path


def remove_dead_socket(path: str) -> bool:
    """Remove a Unix socket that nobody listens on; true if nothing is there (any more).

    Raises OSError for what is no socket, or can't be reached.
    """
    if not Path(path).exists():
        return True
    if not Path(path).is_socket():
        raise FileExistsError(0, "there is a file of another kind")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return True
    return False
