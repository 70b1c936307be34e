"""Entry point: finds the command, runs it, turns errors into one line and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import trunkline
from trunkline.config.cli import argv
from trunkline.types import RequestError

USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    name: str
    about: str
    module: str  # has `run(words) -> exit status`


COMMANDS = (
    Command("serve", "serve a model over HTTP, with the OpenAI API", "trunkline.cli.serve"),
    Command("chat", "talk to a model in the terminal", "trunkline.cli.chat"),
    Command(
        "doctor", "look at this machine: what is there, what is missing, what to do", "trunkline.cli.doctor"
    ),
    Command(
        "make-model",
        "write a model with random weights, for tests and benchmarks",
        "trunkline.cli.make_model",
    ),
    Command("replay", "send the requests of a dump again and compare", "trunkline.cli.replay"),
    Command("bench", "measure: offline, serving, startup, kernels", "trunkline.bench.command"),
    Command("version", "print the version", "trunkline.cli.version"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 found a fault, 2 could not start, 130 interrupted."""
    words = argv() if words is None else list(words)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        words = ["version"]
    command = next((c for c in COMMANDS if c.name == words[0]), None)
    if command is None:
        return fail("trunkline", unknown_word(words[0], [c.name for c in COMMANDS]))
    run: Callable[[list[str]], int] = import_module(command.module).run
    try:
        return run(list(words[1:]))
    except RequestError as error:
        return fail(f"trunkline {command.name}", error.message)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0


def overview() -> str:
    width = max(len(c.name) for c in COMMANDS)
    lines = [f"Trunkline {trunkline.__version__}: a serving engine for language models.", ""]
    lines += ["usage: trunkline COMMAND [FLAGS]", ""]
    lines += [f"  {c.name:<{width}}  {c.about}" for c in COMMANDS]
    lines += [
        "",
        "`trunkline COMMAND --help` lists the flags. `trunkline serve` alone serves the bundled model.",
    ]
    return "\n".join(lines) + "\n"


def unknown_word(word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f"there is no command {word!r}; " + (
        f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
    )


def fail(program: str, message: str) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{program}: error: {message}\n")
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
