"""OpenAI's harmony format: an output is a row of messages, each on a channel.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

The prompt ends with `<|start|>assistant`. A tool call is a message with a recipient; <|call|> ends it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from trunkline.text.cursor import Cursor, Waiting

START, CHANNEL, MESSAGE, MESSAGE_END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CALL_END, RETURN, CONSTRAIN = "<|call|>", "<|return|>", "<|constrain|>"
HARMONY_MARKS = (START, CHANNEL, MESSAGE, MESSAGE_END, CALL_END, RETURN, CONSTRAIN)
ENDS = (MESSAGE_END, CALL_END, RETURN)
MAX_HEADER = 512  # characters

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def harmony(
    cursor: Cursor,
    think: Callable[[str], None],
    answer: Callable[[str], None],
    thinking: Callable[[bool], None],
    *,
    raw: bool = False,
) -> Waiting[None]:
    """Give each message to `think` (channel analysis) or `answer`; headers and ends are dropped. A message
    with a recipient is an answer as it is written, for a parser of tool calls. `thinking` is told where
    reasoning begins and ends. `raw`: everything is given as it is written."""
    while True:
        cursor.hold()
        if (yield from cursor.blanks()) == "":
            answer(cursor.release())
            return
        begun = yield from cursor.take(START, CHANNEL)
        thinking(bool(begun))
        ended = begun and (yield from cursor.until((MESSAGE,), lambda _: None, MAX_HEADER))
        header = cursor.release()
        channel = _CHANNEL.search(header)
        called = not ended or " to=" in header
        inside = channel is not None and channel[1] == "analysis" and not called
        thinking(inside)
        if raw or called:
            answer(header)
        end = yield from cursor.until((*ENDS, START), think if inside else answer)
        if end == START:
            cursor.skip(-len(START))
        elif raw or called:
            answer(end)
        if not end:
            return
