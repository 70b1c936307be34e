"""`trunkline chat`: a conversation in the terminal, with a model in this process or a server elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag
from trunkline.types import FinishReason, RequestError, SamplingParams

ABOUT = (
    "Talk to a model. Without --url it runs in this process, the bundled one by default. In a conversation: "
    "/reset, /system TEXT, /think (on or off), /help, /quit. Ctrl-C ends a reply, Ctrl-D the conversation. "
    "Reasoning is printed dim, before the answer."
)
COMMANDS = """  /reset        forget the conversation
  /system TEXT  set the system message and forget the conversation
  /think        switch the model's thinking on or off, if its template can
  /quit         leave (also Ctrl-D); Ctrl-C ends a reply"""

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    url: str | None = flag(
        "text", "a running server, e.g. http://127.0.0.1:30000", metavar="URL", group="chat"
    )
    system: str | None = flag("text", "system message", group="chat")
    temperature: float | None = flag(
        "float", "0: always the likeliest token. Default: the model's", low=0.0, high=2.0, group="chat"
    )
    max_tokens: int | None = flag(
        "int", "most tokens of a reply. Default: what the context holds", low=1, group="chat"
    )
    log_level: str = again(Args, "log_level", "error")


class Piece(NamedTuple):
    """Of a reply: new reasoning, which comes before the answer and is no part of it, and new answer."""

    thought: str
    answer: str


class Talker(Protocol):
    """Where replies come from."""

    name: str

    def reply(self, messages: list[Message], think: bool | None) -> Iterator[Piece]:
        """Pieces of the reply as they come. Leaving early aborts it. Raises RequestError."""
        ...

    def close(self) -> None: ...


@dataclass
class Conversation:
    """What was said. `think`: whether the model thinks first; None leaves it to the template."""

    system: str | None = None
    think: bool | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]


def run(words: list[str]) -> int:
    if wants_help(words):
        hidden = ("host", "port", "log_level", "watchdog_timeout", "sampling_defaults")
        sys.stdout.write(help_text("trunkline chat [FLAGS]", ABOUT, Options, hide=hidden))
        return 0
    options = parse(words, Options)
    talker: Talker = Remote(options) if options.url else Local(options)
    try:
        converse(talker, Conversation(system=options.system))
    finally:
        talker.close()
    return 0


def converse(talker: Talker, talk: Conversation) -> None:
    """Read lines and print replies until the end of input."""
    shown = sys.stdin.isatty()
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` line editing and history
        print(f"{talker.name}. /help lists the commands.")
    while True:
        try:
            line = input("\n> " if shown else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line.startswith("/"):
            if not obey(line, talk):
                return
        elif line:
            say(line, talker, talk)


def obey(line: str, talk: Conversation) -> bool:
    """Carry out a command. False ends the conversation."""
    word, _, rest = line.partition(" ")
    if word in ("/quit", "/exit", "/bye"):
        return False
    if word == "/reset":
        talk.turns.clear()
    elif word == "/system":
        talk.system = rest.strip() or None
        talk.turns.clear()
    elif word == "/think":
        talk.think = not talk.think
        print(f"thinking is {'on' if talk.think else 'off'}")
    else:
        print(COMMANDS if word == "/help" else f"there is no command {word}\n{COMMANDS}")
    return True


def say(line: str, talker: Talker, talk: Conversation) -> None:
    """One turn. A reply cut short by Ctrl-C stays in the conversation; a failed turn does not."""
    talk.turns.append({"role": "user", "content": line})
    parts: list[str] = []
    reply = talker.reply(talk.messages(), talk.think)
    try:
        with contextlib.closing(reply), Screen() as screen:  # type: ignore[type-var]
            for thought, answer in reply:
                parts.append(answer)
                screen.show(thought, thinking=True)
                screen.show(answer, thinking=False)
    except KeyboardInterrupt:
        pass
    except (RequestError, OSError) as error:
        talk.turns.pop()
        print(f"error: {error}" + (" (/reset starts anew)" if talk.turns else ""))
        return
    print()
    talk.turns.append({"role": "assistant", "content": "".join(parts)})


class Screen:
    """Prints one reply: its reasoning dim in a terminal and between marks elsewhere, then the answer."""

    def __init__(self) -> None:
        dim = sys.stdout.isatty()
        self._begin, self._end = ("\033[2m", "\033[0m\n") if dim else ("[reasoning]\n", "\n[/reasoning]\n")
        self._thinking = False

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_thought()

    def show(self, text: str, *, thinking: bool) -> None:
        if not text:
            return
        if thinking and not self._thinking:
            print(self._begin, end="")
            self._thinking = True
        elif not thinking:
            self._end_thought()
        print(text, end="", flush=True)

    def _end_thought(self) -> None:
        if self._thinking:
            print(self._end, end="", flush=True)
        self._thinking = False


class Local:
    """An engine in this process."""

    def __init__(self, options: Options) -> None:
        from trunkline.config.model_spec import load_model_spec
        from trunkline.engine.offline import Engine
        from trunkline.text.chat_template import ChatTemplate
        from trunkline.text.reasoning import reasoning_format

        given = {f.name: getattr(options, f.name) for f in fields(Args) if f.name != "accepted"}
        self._engine = Engine(**given)
        model = self._engine.config.model
        self.name = model.served_model_name
        folder = model.tokenizer_path or model.path
        tokens = self._engine.tokenizer.special_tokens
        template = ChatTemplate.load(folder, tokens, options.chat_template)
        if template is None:
            self.close()
            raise RequestError(
                f"{folder} has no chat template: give one with --chat-template",
                code="no_chat_template",
                param="--chat-template",
            )
        self._template = template
        self._format = reasoning_format(options.reasoning_parser, template.source)
        self._params: dict[str, Any] = {
            **load_model_spec(model.path).generation_defaults,
            "max_new_tokens": options.max_tokens,
        }
        if options.temperature is not None:
            self._params["temperature"] = options.temperature

    def reply(self, messages: list[Message], think: bool | None) -> Iterator[Piece]:
        from trunkline.server.chat_prompt import chat_prompt
        from trunkline.text.output import OutputText
        from trunkline.text.reasoning import ReasoningSplitter

        known = "enable_thinking" in self._template.variables
        if think is not None and not known:
            raise RequestError("this model's template cannot switch thinking", code="no_thinking")
        asked = {"messages": messages, "chat_template_kwargs": {"enable_thinking": think}}
        prompt = chat_prompt(self._template, asked, None, self._format, bounded=False)
        words = self._engine.tokenizer
        ids = words.encode(prompt.text, add_special_tokens=False)
        marks = prompt.reasoning.format.marks if prompt.reasoning is not None else ()
        text = OutputText(words, SamplingParams(), shown=words.special_ids_of(marks))
        splitter = ReasoningSplitter(prompt.reasoning) if prompt.reasoning is not None else None
        done = 0
        for answer in self._engine.generate(input_ids=ids, sampling_params=self._params, stream=True):
            assert isinstance(answer, dict)
            end = answer["meta_info"]["finish_reason"]
            finish = None if end is None else FinishReason(end["type"], matched=end.get("matched"))
            new, _, _ = text.feed(answer["output_ids"][done:], finish)
            done = len(answer["output_ids"])
            yield Piece("", new) if splitter is None else Piece(*splitter.feed(new))
        if splitter is not None:
            yield Piece(*splitter.flush())

    def close(self) -> None:
        self._engine.shutdown()


class Remote:
    """A server with the OpenAI API. Raises RequestError when it does not answer."""

    def __init__(self, options: Options) -> None:
        import asyncio

        from trunkline.http import HttpClient

        assert options.url is not None
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        self._loop = asyncio.new_event_loop()
        try:
            self._client = HttpClient(options.url, headers)
            models = self._loop.run_until_complete(self._client.json("GET", "/v1/models"))
            self.name = options.served_model_name or str(models["data"][0]["id"])
        except (OSError, EOFError, TypeError, LookupError, ValueError, RequestError) as error:
            self._loop.close()
            raise RequestError(
                f"{options.url} does not answer: {error}", code="no_server", param="--url"
            ) from None
        self._body: dict[str, Any] = {"model": self.name, "stream": True}
        if options.temperature is not None:
            self._body["temperature"] = options.temperature
        if options.max_tokens is not None:
            self._body["max_tokens"] = options.max_tokens

    def reply(self, messages: list[Message], think: bool | None) -> Iterator[Piece]:
        body = {**self._body, "messages": messages}
        if think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": think}
        stream = self._client.events("/v1/chat/completions", body)
        try:
            while (event := self._loop.run_until_complete(anext(stream, None))) is not None:
                for choice in event.get("choices", ()):
                    delta = choice.get("delta", {})
                    # Other servers call it `reasoning`.
                    thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
                    yield Piece(thought, delta.get("content") or "")
        finally:
            self._loop.run_until_complete(stream.aclose())

    def close(self) -> None:
        self._client.close()
        self._loop.close()
