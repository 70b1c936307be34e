"""POST /configure_logging: what is logged and dumped, changed while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trunkline.config.flags import LOG_LEVELS
from trunkline.engine.fields import Flag, Number, OneOf, Rule, Text, Unsupported
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.http import json_response, read_body
from trunkline.types import RequestError

LOGGING_FIELDS: Mapping[str, Rule] = {
    "log_requests": Flag(),
    "log_requests_level": Number(0, 3, integer=True),
    "log_requests_format": OneOf(("text", "json")),
    "log_level": OneOf(LOG_LEVELS),
    "dump_requests_folder": Text(4096),
    "dump_requests_threshold": Number(1, 100000, integer=True),
    "crash_dump_folder": Text(4096),
    "dump_requests_exclude_meta_keys": Unsupported(([],)),
}


def endpoints(parts: Parts) -> list[Endpoint]:
    return [
        Endpoint(
            "/configure_logging", ("POST",), _Logging(parts).configure, Access.ADMIN, LOGGING_FIELDS,
            summary="Change what is logged and dumped; answers with what holds now", one_process=True,
        )
    ]  # fmt: skip


class _Logging:
    def __init__(self, parts: Parts) -> None:
        self._requests = parts.request_log
        self._dumper = parts.dumper

    async def configure(self, request: Request) -> Response:
        fields = await read_body(request, LOGGING_FIELDS)
        requests, dumper = self._requests, self._dumper
        crash = self._folder(fields, "crash_dump_folder", dumper.crash_folder)
        folder = self._folder(fields, "dump_requests_folder", dumper.folder)
        form = fields.get("log_requests_format", "json" if requests.as_json else "text")
        dumper.set(crash, folder, fields.get("dump_requests_threshold", dumper.threshold))
        requests.set(
            fields.get("log_requests", requests.on),
            fields.get("log_requests_level", requests.level),
            form == "json",
        )
        if "log_level" in fields:
            logging.getLogger().setLevel(fields["log_level"].upper())
        return json_response(
            {
                "log_requests": requests.on,
                "log_requests_level": requests.level,
                "log_requests_format": form,
                "log_level": logging.getLevelName(logging.getLogger().level).lower(),
                "dump_requests_folder": _shown(dumper.folder),
                "dump_requests_threshold": dumper.threshold,
                "crash_dump_folder": _shown(dumper.crash_folder),
            }
        )

    def _folder(self, fields: Mapping[str, Any], name: str, now: Path | None) -> Path | None:
        """The folder that a field names; "" switches off. Raises RequestError."""
        if name not in fields:
            return now
        if not fields[name]:
            return None
        folder = Path(fields[name])
        if "\0" in fields[name] or not self._dumper.allows(folder):
            raise RequestError(
                f"{name} must be the folder of --crash-dump-folder or one below it: a client can't choose "
                "other places to write to",
                code="folder_not_allowed",
                param=name,
            )
        return folder


def _shown(folder: Path | None) -> str | None:
    return None if folder is None else str(folder)
