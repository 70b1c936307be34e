"""Records out of text as JSON: once by a regular expression, once by a schema."""

from __future__ import annotations

import json
import random
from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, correct

NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Frank")
TOWNS = ("Lisbon", "Oslo", "Vienna", "Madrid", "Dublin", "Prague")
REGEX = r'\{"name": "[A-Z][a-z]{2,9}", "age": [1-9][0-9], "city": "[A-Z][a-z]{2,9}"\}'
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"type": "string", "maxLength": 12},
        },
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    }
)


@sgl.function
def extract(s: Any, text: str, constraint: dict[str, Any]) -> None:
    s += sgl.system("Extract the data as JSON with the keys name, age and city.")
    s += sgl.user(text)
    s += sgl.assistant(sgl.gen("record", max_tokens=64, temperature=0, **constraint))


def run_with(constraint: dict[str, Any], rows: int) -> tuple[int, int]:
    rng = random.Random(0)
    people = [(rng.choice(NAMES), rng.randint(20, 80), rng.choice(TOWNS)) for _ in range(rows)]
    texts = [f"{name} is {age} years old and lives in {town}." for name, age, town in people]
    states = extract.run_batch([{"text": text, "constraint": constraint} for text in texts])
    pairs = []
    for state, person in zip(states, people, strict=True):
        record = json.loads(state["record"])  # constrained: it always parses
        pairs.append((repr((record["name"], record["age"], record["city"])), repr(person)))
    return correct(pairs)


REGEX_SHAPE = Shape("JSON by regex", lambda rows: run_with({"regex": REGEX}, rows), 32)
SCHEMA_SHAPE = Shape("JSON by schema", lambda rows: run_with({"json_schema": SCHEMA}, rows), 32)

if __name__ == "__main__":
    alone(REGEX_SHAPE)
    alone(SCHEMA_SHAPE)
