"""Keys: the server's own, from files, and those of services outside, from the environment."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from trunkline.config.flags import Args, spelling
from trunkline.types import RequestError

SECRET_FLAGS = ("api_key", "admin_api_key", "ssl_keyfile_password")


def environment_key(name: str) -> str | None:
    """The value of an environment variable such as OPENAI_API_KEY, None if it is unset or empty."""
    return os.environ.get(name) or None


def read_secrets(args: Args) -> Args:
    """Replace each secret given as @FILE by the file's text, so that no process list shows it.

    Raises RequestError for a file that can't be read or is empty.
    """
    texts: dict[str, Any] = {}
    for attribute in SECRET_FLAGS:
        given = getattr(args, attribute)
        if given is None or not given.startswith("@"):
            continue
        name = spelling(attribute)
        try:
            text = Path(given[1:]).read_text().strip()
        except (OSError, UnicodeDecodeError):
            text = ""
        if not text:
            raise RequestError(
                f"{name}: the file {given[1:]!r} can't be read as text, or is empty",
                code="file_not_found",
                param=name,
            )
        texts[attribute] = text
    return dataclasses.replace(args, **texts)
