"""`python -m benchmarks.peers setup|run|table`: see the README beside this file."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.peers.environments import ENGINES, PEERS, Environments
from benchmarks.peers.report import read, table
from benchmarks.peers.rounds import Plan, run_all
from benchmarks.peers.workloads import WORKLOADS, RunError


def main(words: list[str]) -> int:
    options = parser().parse_args(words)
    if options.command == "table":
        return print_table(options.file)
    folder = options.env_dir.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.command == "setup":
        return setup(options.names or list(PEERS), Environments(folder))
    if not (options.model / "config.json").is_file():
        hint = "`trunkline make-model --shape qwen3-0.6b --out DIR` writes one"
        print(f"{options.model} holds no model: {hint}", file=sys.stderr)
        return 2
    plan = Plan(
        workloads=options.workloads,
        engines=options.engines,
        repeat=options.repeat,
        model=options.model.resolve(),
        seed=options.seed,
        timeout=options.timeout,
    )
    return run(plan, Environments(folder, options.threads))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    setup_words = commands.add_parser("setup", help="make the peers' environments")
    setup_words.add_argument("names", nargs="*", metavar="NAME", type=peer, help="default: all peers")
    run_words = commands.add_parser("run", help="run the workloads, one JSON line a run")
    run_words.add_argument("--model", type=Path, required=True, help="folder that trunkline make-model wrote")
    run_words.add_argument("--workloads", type=workloads, default=workloads("a,b,c,d"))
    run_words.add_argument("--engines", type=engines, default=list(ENGINES))
    run_words.add_argument("--repeat", type=int, default=3, help="rounds")
    run_words.add_argument("--threads", type=int, default=2)
    run_words.add_argument("--seed", type=int, default=0, help="of the prompts")
    run_words.add_argument("--timeout", type=float, default=300.0, help="seconds a run may take")
    for command in (setup_words, run_words):
        command.add_argument("--env-dir", type=Path, default=Path("~/.cache/trunkline-peers"))
    table_words = commands.add_parser("table", help="medians, ranges and ratios as Markdown")
    table_words.add_argument("file", type=Path)
    return top


def peer(word: str) -> str:
    return known(word, list(PEERS))[0]


def engines(word: str) -> list[str]:
    return known(word, list(ENGINES))


def workloads(word: str) -> list[str]:
    return known(word, list(WORKLOADS))


def known(word: str, names: list[str]) -> list[str]:
    """The comma-separated names in `word`. Raises ArgumentTypeError when one is none of `names`."""
    found = [name.strip() for name in word.split(",") if name.strip()]
    if not found or set(found) - set(names):
        raise argparse.ArgumentTypeError(f"{word!r}: choose from {', '.join(names)}")
    return found


def setup(names: list[str], environments: Environments) -> int:
    """Set up each, whatever becomes of the others; exit status 1 if one failed."""
    failed = 0
    for name in tqdm(names, unit="engine", desc="setup"):
        result: dict[str, object] = {"engine": name, "folder": str(environments.folder / name)}
        try:
            environments.setup(name)
        except RunError as error:
            failed, result = 1, result | {"error": str(error)}
        print(json.dumps(result), flush=True)
    return failed


def run(plan: Plan, environments: Environments) -> int:
    """Print each result as it comes. Exit status 1 if no run gave a figure."""
    succeeded = False
    with tqdm(total=len(list(plan.runs())), unit="run", file=sys.stderr) as bar:
        for result in run_all(plan, environments):
            succeeded |= "value" in result
            print(json.dumps(result), flush=True)
            bar.set_postfix_str(f"{result['engine']} {result['workload']}")
            bar.update()
    return 0 if succeeded else 1


def print_table(file: Path) -> int:
    try:
        print(table(read(file.read_text().splitlines())))
    except (OSError, ValueError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an engine in its run is ended too
    sys.exit(main(sys.argv[1:]))
