"""/v1/files: what batches read and write."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message

from trunkline.engine.fields import Number, OneOf, Rule, Text
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.http import json_response, read_query
from trunkline.server.storage import Json, Storage, file_gone
from trunkline.types import RequestError

PURPOSES = ("batch", "user_data")
UPLOAD_TIME = 900.0  # seconds in which an upload must have come
MAX_FILE = 200 * 2**20  # bytes of a file; OpenAI's own bound
MAX_UPLOADS = 4  # that come at once; each is kept in a temporary file until it is whole
FORM = 65536  # bytes of an upload beside the file itself
MAX_NAME = 512

_LIST: Mapping[str, Rule] = {
    "limit": Number(1, 10_000),
    "after": Text(),
    "order": OneOf(("asc", "desc")),
    "purpose": OneOf((*PURPOSES, "batch_output")),
}


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Files(parts)
    path, user = "/v1/files", Access.USER
    return [
        Endpoint(path, ("POST",), own.upload, user, summary="Upload a file, as multipart/form-data"),
        Endpoint(path, ("GET",), own.list, user, query=_LIST, summary="The files"),
        Endpoint(path + "/{id}", ("GET",), own.get, user, summary="What is known of a file"),
        Endpoint(path + "/{id}", ("DELETE",), own.delete, user, summary="Delete a file"),
        Endpoint(path + "/{id}/content", ("GET",), own.content, user, summary="The content of a file"),
    ]


class _Files:
    def __init__(self, parts: Parts) -> None:
        self._shared = parts.storage
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)

    @property
    def _storage(self) -> Storage:
        return need(self._shared)

    async def upload(self, request: Request) -> Response:
        storage = self._storage
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise RequestError(
                "send the file as multipart/form-data, with the fields file and purpose",
                code="invalid_type",
                param="file",
                status=415,
            )
        bounded = Request(request.scope, self._bounded(request))
        try:
            async with (
                asyncio.timeout(UPLOAD_TIME),
                self._uploads,
                bounded.form(max_files=1, max_fields=8) as form,
            ):
                source, purpose = self._checked(dict(form))
                name = (source.filename or "file")[:MAX_NAME]
                return json_response(await storage.run(storage.add_file, source.file, name, purpose))
        except TimeoutError:
            raise RequestError(
                f"the upload did not arrive within {UPLOAD_TIME:g} s", code="body_timeout", status=408
            ) from None
        except MultiPartException as error:
            raise RequestError(
                f"the form can't be read: {error.message}", code="invalid_form", param="file"
            ) from error

    def _bounded(self, request: Request) -> Any:
        size = 0

        async def receive() -> Message:
            nonlocal size
            message = await request.receive()
            size += len(message.get("body", b""))
            if size > MAX_FILE + FORM:
                raise RequestError(
                    f"the file is larger than {MAX_FILE} bytes",
                    code="file_too_large",
                    param="file",
                    status=413,
                )
            return message

        return receive

    def _checked(self, form: Mapping[str, Any]) -> tuple[UploadFile, str]:
        for name in form:
            if name not in ("file", "purpose"):
                raise RequestError(
                    f"{name[:100]!r} is no field of an upload", code="unknown_field", param=name[:200]
                )
        source, purpose = form.get("file"), form.get("purpose")
        if not isinstance(source, UploadFile):
            raise RequestError("file is missing", code="missing_field", param="file")
        if purpose is None:
            raise RequestError("purpose is missing", code="missing_field", param="purpose")
        if (source.size or 0) > MAX_FILE:
            raise RequestError(
                f"the file has {source.size} bytes; it may have {MAX_FILE}",
                code="file_too_large",
                param="file",
                status=413,
            )
        return source, OneOf(PURPOSES).read(purpose, "purpose")

    async def list(self, request: Request) -> Response:
        query, storage = read_query(_LIST, request), self._storage
        limit = int(query.get("limit", 10_000))
        newest_first = query.get("order", "desc") == "desc"
        found = await storage.run(
            storage.files, query.get("purpose"), query.get("after"), limit + 1, newest_first
        )
        return json_response(page(found, limit))

    async def _known(self, request: Request) -> Json:
        storage = self._storage
        file = await storage.run(storage.file, request.path_params["id"])
        if file is None:
            raise no_file(request.path_params["id"], "file_id")
        return file

    async def get(self, request: Request) -> Response:
        return json_response(await self._known(request))

    async def delete(self, request: Request) -> Response:
        file, storage = await self._known(request), self._storage
        deleted = await storage.run(storage.delete_file, file["id"])
        return json_response({"id": file["id"], "object": "file", "deleted": deleted})

    async def content(self, request: Request) -> Response:
        file = await self._known(request)
        path = self._storage.path(file["id"])
        if not path.exists():
            raise file_gone(file["id"], "file_id")
        return FileResponse(
            path,
            media_type="application/octet-stream",
            filename=file["filename"],
        )


def need(storage: Storage | None) -> Storage:
    """Raises RequestError where no files are kept."""
    if storage is None:
        raise RequestError(
            "this server keeps no files (--file-storage-size)", code="storage_disabled", param="file"
        )
    return storage


def no_file(file_id: str, param: str) -> RequestError:
    return RequestError(f"there is no file {file_id[:100]!r}", code="file_not_found", param=param, status=404)


def page(found: list[Json], limit: int) -> Json:
    """One page of a list, from up to one object more than it shows."""
    shown = found[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return {"object": "list", "data": shown, **ends, "has_more": len(found) > limit}
