"""API keys of services outside, as their own clients find them: in the environment."""

from __future__ import annotations

import os


def environment_key(name: str) -> str | None:
    """The value of an environment variable such as OPENAI_API_KEY, None if it is unset or empty."""
    return os.environ.get(name) or None
