"""Choosing and filling a tool call, answering without one, and stating a tool's result."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import words
from .sample import Message, Sample, assistant, listed, order, question, user
from .tasks_basic import TURNS

# slot -> (JSON type, value maker); a slot's schema name varies, so it has to be read from the schema
_SLOTS: dict[str, tuple[str, Callable[[random.Random], Any]]] = {
    "city": ("string", words.place),
    "from": ("string", words.place),
    "to": ("string", words.place),
    "person": ("string", words.person),
    "time": ("string", words.clock),
    "day": ("string", lambda r: r.choice(words.DAYS)),
    "minutes": ("integer", lambda r: r.randint(1, 90)),
    "amount": ("integer", lambda r: r.randint(1, 999)),
    "degrees": ("integer", lambda r: r.randint(5, 30)),
    "room": ("string", lambda r: r.choice(words.ROOMS)),
    "query": ("string", lambda r: " ".join(r.sample(words.SAID, r.randint(1, 2)))),
    "text": ("string", lambda r: " ".join(r.sample(words.SAID, r.randint(2, 3)))),
    "title": ("string", lambda r: " ".join(r.sample(words.SAID, r.randint(1, 2)))),
    "language": ("string", lambda r: r.choice(words.LANGUAGES)),
    "code": ("string", words.code),
    "topic": ("string", lambda r: r.choice(words.TOPICS)),
    "a": ("integer", lambda r: r.randint(0, 999)),
    "b": ("integer", lambda r: r.randint(0, 999)),
    "currency": ("string", lambda r: r.choice(["USD", "EUR", "GBP", "JPY", "CHF"])),
    "target": ("string", lambda r: r.choice(["USD", "EUR", "GBP", "JPY", "CHF"])),
}
_ALIASES = {
    "city": ["city", "location"],
    "from": ["from", "origin"],
    "to": ["to", "destination"],
    "person": ["name", "person"],
    "time": ["time", "at"],
    "day": ["day", "date"],
    "minutes": ["minutes", "duration"],
    "amount": ["amount", "value"],
    "degrees": ["degrees", "temperature"],
    "room": ["room", "location"],
    "query": ["query", "q"],
    "text": ["text", "message"],
    "title": ["title", "song"],
    "language": ["language", "lang"],
    "code": ["code", "number"],
    "topic": ["topic", "subject"],
    "currency": ["currency", "source"],
    "target": ["target", "to_currency"],
    "a": ["a", "x"],
    "b": ["b", "y"],
}
# (function names, description, slots, requests)
_FAMILIES: list[tuple[list[str], str, list[str], list[str]]] = [
    (
        ["get_weather", "weather", "get_current_weather"],
        "Get the weather of a city.",
        ["city"],
        [
            "What is the weather in {city}?",
            "What's the weather like in {city}?",
            "How is the weather in {city} today?",
            "Is it raining in {city}?",
            "Tell me the weather in {city}.",
            "weather in {city}",
        ],
    ),
    (
        ["get_time", "current_time", "get_local_time"],
        "Get the local time of a city.",
        ["city"],
        ["What time is it in {city}?", "Tell me the time in {city}.", "What is the local time in {city}?"],
    ),
    (
        ["convert_currency", "exchange"],
        "Convert money between currencies.",
        ["amount", "currency", "target"],
        [
            "Convert {amount} {currency} to {target}.",
            "How much is {amount} {currency} in {target}?",
            "Change {amount} {currency} into {target}.",
        ],
    ),
    (
        ["send_message", "send_email", "message"],
        "Send a message to a person.",
        ["person", "text"],
        [
            "Send {person} the message {text}.",
            "Write to {person}: {text}",
            "Tell {person} {text}.",
            'Send a message to {person} saying "{text}".',
        ],
    ),
    (
        ["set_alarm", "create_alarm"],
        "Set an alarm.",
        ["time"],
        ["Set an alarm for {time}.", "Wake me up at {time}.", "I need an alarm at {time}."],
    ),
    (
        ["set_timer", "start_timer"],
        "Start a timer.",
        ["minutes"],
        [
            "Set a timer for {minutes} minutes.",
            "Start a {minutes} minute timer.",
            "Timer for {minutes} minutes.",
        ],
    ),
    (
        ["search_web", "web_search", "search"],
        "Search the web.",
        ["query"],
        ["Search the web for {query}.", "Look up {query}.", "Search for {query}.", "Google {query}."],
    ),
    (
        ["play_song", "play_music"],
        "Play a song.",
        ["title"],
        ["Play {title}.", "Play the song {title}.", "I want to hear {title}."],
    ),
    (
        ["translate", "translate_text"],
        "Translate a text.",
        ["text", "language"],
        ["Translate {text} into {language}.", "Translate {text} to {language}.", "Say {text} in {language}."],
    ),
    (
        ["get_stock_price", "stock_price"],
        "Get the price of a stock.",
        ["code"],
        ["What is the stock price of {code}?", "Stock price of {code}.", "How much is the stock {code}?"],
    ),
    (
        ["light_on", "turn_on_light"],
        "Turn on the light of a room.",
        ["room"],
        ["Turn on the light in the {room}.", "Switch on the {room} light.", "Light on in the {room}."],
    ),
    (
        ["set_temperature", "set_heating"],
        "Set the temperature of a room.",
        ["room", "degrees"],
        [
            "Set the {room} to {degrees} degrees.",
            "Heat the {room} to {degrees} degrees.",
            "Make the temperature in the {room} {degrees}.",
        ],
    ),
    (
        ["find_contact", "get_phone_number"],
        "Find the phone number of a person.",
        ["person"],
        ["What is the phone number of {person}?", "Find the number of {person}.", "How can I call {person}?"],
    ),
    (
        ["get_news", "news"],
        "Get the news about a topic.",
        ["topic"],
        ["What is the news about {topic}?", "Get me the {topic} news.", "Show news on {topic}."],
    ),
    (
        ["book_flight", "find_flight"],
        "Find a flight.",
        ["from", "to", "day"],
        [
            "Book a flight from {from} to {to} on {day}.",
            "Find a flight to {to} from {from} on {day}.",
            "On {day} I want to fly from {from} to {to}.",
        ],
    ),
    (
        ["add", "add_numbers", "sum"],
        "Add two numbers.",
        ["a", "b"],
        ["Add {a} and {b}.", "What is {a} + {b}?", "Compute {a} plus {b}.", "What is {a} plus {b}?"],
    ),
    (
        ["multiply", "multiply_numbers"],
        "Multiply two numbers.",
        ["a", "b"],
        ["Multiply {a} by {b}.", "What is {a} x {b}?", "What is {a} times {b}?"],
    ),
]


@dataclass
class Request:
    """A tool, a request for it and the arguments to fill in."""

    tool: dict[str, Any]
    text: str
    arguments: dict[str, Any]
    family: str


def _schema(
    rng: random.Random, name: str, description: str, slots: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A function definition and the name each slot has in it."""
    names: dict[str, str] = {}
    for slot in slots:
        options = [alias for alias in _ALIASES[slot] if alias not in names.values()]
        names[slot] = options[0] if rng.random() < 0.5 else rng.choice(options)
    properties: dict[str, Any] = {names[slot]: {"type": _SLOTS[slot][0]} for slot in slots}
    if rng.random() < 0.2:
        for slot in slots:
            properties[names[slot]]["description"] = f"The {slot}."
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.85:
        function["description"] = description
    function["parameters"] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        function["parameters"]["required"] = list(names.values())
    return {"type": "function", "function": function}, names


def _family_request(rng: random.Random, index: int) -> Request:
    names, description, slots, requests = _FAMILIES[index]
    tool, aliases = _schema(rng, rng.choice(names), description, slots)
    values = {slot: _SLOTS[slot][1](rng) for slot in slots}
    text = rng.choice(requests).format(**values)
    roll = rng.random()
    if text.endswith("?"):
        text = question(rng, text[:-1])
    elif text.endswith(".") and not text.startswith(("I ", "On ")) and roll < 0.7:
        text = order(rng, text[:-1])
    return Request(tool, text, {aliases[slot]: values[slot] for slot in slots}, names[0])


def _request(rng: random.Random) -> Request:
    return _family_request(rng, rng.randrange(len(_FAMILIES)))


def _offer(rng: random.Random, chosen: Request, others: int) -> list[Request]:
    """The chosen tool among ``others`` different ones, each with a request that it fits."""
    offered = {chosen.family: chosen}
    while len(offered) < others + 1:
        extra = _request(rng)
        offered.setdefault(extra.family, extra)
    requests = list(offered.values())
    rng.shuffle(requests)
    return requests


def _earlier(rng: random.Random, requests: list[Request]) -> list[Message]:
    """Whole exchanges with some of the offered tools: request, call, result, answer."""
    messages: list[Message] = []
    for request in requests:
        content, answer = _result(rng)
        messages += [
            user(request.text),
            _call(request),
            {"role": "tool", "content": content},
            assistant(answer),
        ]
    return messages


def _call(request: Request) -> Message:
    name = request.tool["function"]["name"]
    call = {"type": "function", "function": {"name": name, "arguments": request.arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def tool_call(rng: random.Random, split: str) -> Sample:
    """One call among one to four offered tools; sometimes none is needed."""
    chosen = _request(rng)
    requests = _offer(rng, chosen, rng.choice([0, 1, 1, 2, 2, 3]))
    tools = [request.tool for request in requests]
    if rng.random() < 0.06:
        text, answer, _ = TURNS["chat"](rng, split)
        return Sample("tool_call", [user(text)], answer, tools=tools, thought="No tool is needed.")
    others = [request for request in requests if request is not chosen]
    history: list[Message] = []
    if others and rng.random() < (0.8 if split == "train" else 0.25):
        history = _earlier(rng, rng.sample(others, rng.randint(1, len(others))))
    name = chosen.tool["function"]["name"]
    answer = call_text(name, chosen.arguments)
    messages = [*history, user(chosen.text)]
    return Sample("tool_call", messages, answer, "tool", tools=tools, thought=f"I call {name}.")


_RESULT_KEYS: dict[str, Callable[[random.Random], Any]] = {
    "temperature": lambda r: r.randint(-10, 38),
    "condition": lambda r: r.choice(["sunny", "cloudy", "rainy", "windy"]),
    "city": words.place,
    "price": lambda r: r.randint(1, 999),
    "status": lambda r: r.choice(["done", "ok", "sent", "open"]),
    "time": words.clock,
    "name": words.person,
    "phone": lambda r: str(r.randint(100000, 999999)),
    "distance": lambda r: r.randint(2, 4000),
    "total": lambda r: r.randint(1, 2000),
    "code": words.code,
    "result": lambda r: r.randint(0, 999),
    "day": lambda r: r.choice(words.DAYS),
    "color": lambda r: r.choice(words.COLORS),
    "count": lambda r: r.randint(0, 99),
    "owner": words.person,
    "id": lambda r: r.randint(1, 9999),
}


def _state(result: dict[str, Any]) -> str:
    """A result in words: ``The city is Oslo and the price is 3.``"""
    text = listed([f"the {key} is {value}" for key, value in result.items()])
    return text[0].upper() + text[1:] + "."


def _result(rng: random.Random) -> tuple[str, str]:
    """What a tool returns, a JSON object or a plain value, and its statement."""
    if rng.random() < 0.8:
        keys = rng.sample(list(_RESULT_KEYS), rng.randint(1, 3))
        result = {key: _RESULT_KEYS[key](rng) for key in keys}
        return json.dumps(result), _state(result)
    value = str(_RESULT_KEYS[rng.choice(list(_RESULT_KEYS))](rng))
    return value, f"The result is {value}."


def tool_result(rng: random.Random, split: str) -> Sample:
    """The answer after a tool has returned."""
    chosen = _request(rng)
    requests = _offer(rng, chosen, rng.choice([0, 0, 0, 1, 2]))
    content, answer = _result(rng)
    others = [request for request in requests if request is not chosen]
    history = _earlier(rng, others) if split == "train" else []
    messages = [*history, user(chosen.text), _call(chosen), {"role": "tool", "content": content}]
    tools = [request.tool for request in requests]
    return Sample("tool_result", messages, answer, tools=tools, thought="The tool has answered.")
