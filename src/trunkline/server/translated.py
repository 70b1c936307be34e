"""What interfaces share that are answered by translating their requests into chat completions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trunkline.server.call import Json, ServedModel
from trunkline.server.chat import ChatCall, parse_chat
from trunkline.types import FinishReason, RequestError

Renames = Sequence[tuple[str, str]]  # pattern of a chat field's whole name -> name here


def parse_translated(body: Json, model: ServedModel, renames: Renames) -> ChatCall:
    """`parse_chat`, with errors in the names of the other interface. Raises RequestError."""
    try:
        return parse_chat({name: value for name, value in body.items() if value is not None}, model)
    except RequestError as error:
        raise renamed(error, renames) from error


def renamed(error: RequestError, renames: Renames) -> RequestError:
    param = error.param or ""
    for pattern, name in renames:
        if re.fullmatch(pattern, param):
            other = re.sub(pattern, name, param)
            message = error.message.replace(param, other)
            return RequestError(message, code=error.code, param=other, status=error.status)
    return error


def thinking_kwargs(model: ServedModel, wanted: bool | None) -> Json | None:
    """Arguments of the template that switch thinking on or off; None: it is as it is."""
    template = model.template
    if wanted is None or template is None:
        return None
    names = [name for name in ("enable_thinking", "thinking") if name in template.variables]
    if not names and wanted and model.reasoning is not None:
        return None  # it always thinks
    return {(names or ["enable_thinking"])[0]: wanted}


def check_not_aborted(finish: FinishReason) -> None:
    """These interfaces know no answer that was ended from outside. Raises RequestError."""
    if finish.kind == "abort":
        raise RequestError(finish.message or "the request was aborted", code="aborted", status=503)


def missing(fields: Mapping[str, Any], *names: str) -> None:
    """Raises RequestError for a field that is not there."""
    for name in names:
        if name not in fields:
            raise RequestError(f"{name} is missing", code="missing_field", param=name)
