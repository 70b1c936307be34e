"""Field extraction, few-shot classification, recall over turns, and facts hidden in long texts."""

from __future__ import annotations

import json
import random
from typing import Any

from . import words
from .sample import Sample, assistant, listed, order, question, user
from .tasks_basic import TURNS


# ---- extraction -------------------------------------------------------------------------------------------
def _person_record(rng: random.Random) -> tuple[dict[str, Any], str]:
    f = {
        "name": words.person(rng),
        "age": rng.randint(5, 95),
        "city": words.place(rng),
        "job": rng.choice(words.JOBS),
    }
    text = rng.choice(
        [
            "{name} is {age} years old and lives in {city}, working as a {job}.",
            "{name}, a {age}-year-old {job}, lives in {city}.",
            "My friend {name} is a {job} from {city} and is {age} years old.",
            "In {city} there is a {job} called {name}, aged {age}.",
            "{name} works as a {job} in {city}. {name} is {age}.",
            "The {job} {name} ({age}) is from {city}.",
        ]
    )
    return f, text.format(**f)


def _order_record(rng: random.Random) -> tuple[dict[str, Any], str]:
    f = {
        "customer": words.person(rng),
        "quantity": rng.randint(2, 60),
        "price": rng.randint(2, 250),
    }
    text = rng.choice(
        [
            "{customer} bought {quantity} {item} for {price} dollars.",
            "{customer} ordered {quantity} {item} and paid {price} dollars.",
            "We sold {quantity} {item} to {customer} for {price} dollars.",
            "An order of {quantity} {item} at {price} dollars came in from {customer}.",
            "For {price} dollars, {customer} got {quantity} {item}.",
        ]
    )
    return f, text.format(**f, item=rng.choice(words.ITEMS))


def _meeting_record(rng: random.Random) -> tuple[dict[str, Any], str]:
    f = {
        "person": words.person(rng),
        "day": rng.choice(words.DAYS),
        "time": words.clock(rng),
        "topic": rng.choice(words.TOPICS),
        "room": rng.choice("ABCDEFGH") + str(rng.randint(1, 40)),
    }
    text = rng.choice(
        [
            "The meeting with {person} about {topic} is on {day} at {time} in room {room}.",
            "On {day} at {time} we meet {person} in room {room} to talk about {topic}.",
            "{person} will speak about {topic} in room {room} on {day} at {time}.",
            "Meet {person} on {day}, {time}, room {room}, topic {topic}.",
        ]
    )
    return f, text.format(**f)


def _trip_record(rng: random.Random) -> tuple[dict[str, Any], str]:
    f = {
        "traveler": words.person(rng),
        "from": words.place(rng),
        "to": words.place(rng),
        "month": rng.choice(words.MONTHS),
        "vehicle": rng.choice(["train", "bus", "plane", "car", "ship", "ferry"]),
    }
    text = rng.choice(
        [
            "{traveler} travels from {from} to {to} by {vehicle} in {month}.",
            "In {month}, {traveler} will take the {vehicle} from {from} to {to}.",
            "{traveler} goes to {to} by {vehicle} in {month}, starting from {from}.",
            "The {vehicle} takes {traveler} from {from} to {to} in {month}.",
        ]
    )
    return f, text.format(**f)


_RECORDS = [_person_record, _order_record, _order_record, _meeting_record, _trip_record]


def extract(rng: random.Random, split: str) -> Sample:
    """Named fields of a sentence as a JSON object, keys in the order asked for."""
    fields, text = rng.choice(_RECORDS)(rng)
    keys = rng.sample(list(fields), rng.randint(1, len(fields)))
    answer = json.dumps({key: fields[key] for key in keys})
    names = rng.choice([listed(keys), ", ".join(keys)])
    form = rng.choice(
        [
            "Extract the {k} as JSON: {t}",
            "Extract {k} from this sentence as JSON: {t}",
            "Extract the {k} as JSON.\n\n{t}",
            "{t}\n\nGive me the {k} as JSON.",
            "Turn this into JSON with the keys {k}: {t}",
            "Return JSON with {k}: {t}",
            "{t} Extract {k} as JSON.",
            "Read the sentence and write a JSON object with {k}.\nSentence: {t}",
        ]
    )
    text = form.format(k=names, t=text)
    return Sample("extract", [user(text)], answer, "json", thought="I look for the fields.")


# ---- few-shot classification ------------------------------------------------------------------------------
def _text_for(rng: random.Random, group: str, word: str, style: int) -> str:
    if group in ("good", "bad"):
        thing = rng.choice(words.REVIEWED)
        return [f"The {thing} was {word}", f"A {word} {thing}", f"What a {word} {thing}"][style % 3]
    return [word, word, f"I saw a {word}", f"the {word}"][style % 4]


def _labels(rng: random.Random, groups: list[str]) -> list[str]:
    roll = rng.random()
    if roll < 0.4:
        return [{"good": "positive", "bad": "negative"}.get(group, group) for group in groups]
    if roll < 0.6:
        return rng.sample("ABCDXYZ", len(groups))
    if roll < 0.7:
        return rng.sample("123456789", len(groups))
    return [words.made_up(rng, 1, 2) for _ in groups]


_SHOT_FORMS = [
    ("Text: {t}\nLabel: {l}", "\n\n"),
    ("Input: {t}\nOutput: {l}", "\n\n"),
    ("{t} -> {l}", "\n"),
    ("{t}: {l}", "\n"),
    ("{t} = {l}", "\n"),
    ("Text: {t}\nClass: {l}", "\n\n"),
]
_SHOT_INTROS = [
    "Classify the last text like the examples.",
    "Label the text.",
    "Give the label of the last line.",
    "Classify.",
    "Look at the examples and label the last one.",
    "Use the examples to classify the text.",
    "",
]


def classify(rng: random.Random, split: str) -> Sample:
    """Two or three classes that only the examples in the prompt define."""
    if rng.random() < 0.25:
        groups = ["good", "bad"]
    else:
        groups = rng.sample(words.CLASSES, rng.choice([2, 2, 3]))
    labels = _labels(rng, groups)
    pools = {"good": words.GOOD, "bad": words.BAD, **words.CATEGORIES}
    style = rng.randint(0, 11)
    shots = rng.choice([2, 3, 3, 4]) if len(groups) == 2 else rng.choice([2, 3])
    examples = []
    target = rng.randrange(len(groups))
    query = ""
    for index, group in enumerate(groups):
        chosen = rng.sample(pools[group], shots + 1)
        examples += [(_text_for(rng, group, word, style), labels[index]) for word in chosen[:shots]]
        if index == target:
            query = _text_for(rng, group, chosen[shots], style)
    rng.shuffle(examples)
    form, gap = rng.choice(_SHOT_FORMS)
    parts = [form.format(t=text, l=label) for text, label in examples]
    parts.append(form.format(t=query, l="").rstrip())
    intro = rng.choice(_SHOT_INTROS)
    text = (intro + "\n\n" if intro else "") + gap.join(parts)
    hints, seen, position = [], set(), len(text) - len(gap.join(parts))
    for (_, label), part in zip(
        examples, parts, strict=False
    ):  # after its first example a label can be guessed
        position += len(part) + len(gap)
        if label in seen:
            hints.append((position - len(gap) - len(label), position - len(gap)))
        seen.add(label)
    thought = "I compare it with the examples."
    return Sample("classify", [user(text)], labels[target], thought=thought, hints=hints)


# ---- recall over turns ------------------------------------------------------------------------------------
# topic -> (statements, questions, answer); "{v}" is the value
_FACTS: dict[str, tuple[list[str], list[str], str]] = {
    "name": (
        ["My name is {v}", "I am {v}", "I'm {v}", "Call me {v}"],
        ["What is my name", "What's my name", "Who am I", "Do you remember my name"],
        "Your name is {v}.",
    ),
    "city": (
        ["I live in {v}", "My home is in {v}", "I am from {v}"],
        ["Where do I live", "Which city do I live in", "What city am I from"],
        "You live in {v}.",
    ),
    "color": (
        ["My favorite color is {v}", "The color I like most is {v}"],
        ["What is my favorite color", "Which color do I like", "What color do I like most"],
        "Your favorite color is {v}.",
    ),
    "food": (
        ["My favorite food is {v}", "I love to eat {v}"],
        ["What is my favorite food", "What do I love to eat", "Which food do I like"],
        "Your favorite food is {v}.",
    ),
    "number": (
        ["My lucky number is {v}", "My favorite number is {v}"],
        ["What is my lucky number", "What is my favorite number", "Which number do I like"],
        "Your number is {v}.",
    ),
    "code": (
        ["My locker code is {v}", "The code of my locker is {v}"],
        ["What is my locker code", "What's the code of my locker"],
        "Your locker code is {v}.",
    ),
    "job": (
        ["I work as a {v}", "My job is {v}", "I am a {v}"],
        ["What is my job", "What do I work as", "What do I do for work"],
        "You work as a {v}.",
    ),
    "age": (
        ["I am {v} years old", "My age is {v}"],
        ["How old am I", "What is my age"],
        "You are {v} years old.",
    ),
    "birthday": (
        ["My birthday is in {v}", "I was born in {v}"],
        ["When is my birthday", "In which month was I born"],
        "Your birthday is in {v}.",
    ),
    **{
        pet: (
            [f"My {pet} is called {{v}}", f"I have a {pet} named {{v}}", f"My {pet}'s name is {{v}}"],
            [f"What is my {pet} called", f"What is the name of my {pet}", f"What's my {pet}'s name"],
            f"Your {pet} is called {{v}}.",
        )
        for pet in [*words.PETS, "sister", "brother", "friend", "boss"]
    },
}


def _value(rng: random.Random, topic: str) -> str:
    makers = {
        "city": words.place,
        "code": words.code,
        "number": lambda r: str(r.randint(1, 999)),
        "age": lambda r: str(r.randint(6, 95)),
        "birthday": lambda r: r.choice(words.MONTHS),
        "color": lambda r: r.choice(words.COLORS),
        "food": lambda r: r.choice(words.FOODS),
        "job": lambda r: r.choice(words.JOBS),
    }
    return makers.get(topic, words.person)(rng)


def acknowledge(topic: str, value: str) -> str:
    """What the model says when it is told a fact."""
    return f"Nice to meet you, {value}!" if topic == "name" else "Okay, I will remember that."


def _statement(rng: random.Random, topic: str, value: str) -> str:
    text = rng.choice(_FACTS[topic][0]).format(v=value)
    if rng.random() < 0.2:
        text = (
            rng.choice(["Hi! ", "Hello, ", "By the way, ", "Remember this: ", "Please remember: ", "Also, "])
            + text
        )
    elif rng.random() < 0.2 and not text.startswith("I"):
        text = text[0].lower() + text[1:]
    return text + rng.choice([".", ".", "", "!"])


def recall(rng: random.Random, split: str) -> Sample:
    """Facts told in earlier turns, other talk in between, then a question about one of them."""
    topics = rng.sample(list(_FACTS), rng.randint(1, 4))
    values = {topic: _value(rng, topic) for topic in topics}
    messages = []
    queue = list(topics)
    while queue:
        first = queue.pop(0)
        text, reply = _statement(rng, first, values[first]), acknowledge(first, values[first])
        if queue and rng.random() < 0.25:
            second = queue.pop(0)
            text += " " + _statement(rng, second, values[second])
            reply = reply if first == "name" else acknowledge(second, values[second])
        messages += [user(text), assistant(reply)]
        while rng.random() < 0.3:
            request, answer, _ = TURNS[rng.choice(["arithmetic", "spell", "chat", "sort"])](rng, split)
            messages += [user(request), assistant(answer)]
    if rng.random() < 0.12:  # the reply to being told a fact is part of the task
        last = rng.choice([t for t in _FACTS if t not in topics])
        value = _value(rng, last)
        return Sample(
            "recall",
            [*messages, user(_statement(rng, last, value))],
            acknowledge(last, value),
            thought="I am told something to remember.",
        )
    asked = rng.choice(topics)
    _, questions, answer = _FACTS[asked]
    messages.append(user(question(rng, rng.choice(questions))))
    return Sample("recall", messages, answer.format(v=values[asked]), thought="I look for it in our chat.")


# ---- needle -----------------------------------------------------------------------------------------------
_DID = (
    "painted cleaned found sold fixed opened closed carried watched moved bought lost washed borrowed".split()
)
_ADJ = "old new small large heavy broken shiny wooden dusty quiet empty round cheap soft".split()
_WHERE = [
    "near the river",
    "in the garden",
    "behind the school",
    "on Monday",
    "in the evening",
    "at the market",
    "before lunch",
    "next to the bridge",
    "after the storm",
    "in the village",
    "on the hill",
    "last summer",
]


def filler(rng: random.Random) -> str:
    """A sentence that holds no fact anybody asks for."""
    thing = rng.choice(words.EXTRA[:40])
    who = rng.choice(
        [words.person(rng), "The " + rng.choice(words.JOBS), "A " + rng.choice(words.JOBS), "Somebody"]
    )
    return f"{who} {rng.choice(_DID)} the {rng.choice(_ADJ)} {thing} {rng.choice(_WHERE)}."


def _fact(rng: random.Random, kind: int) -> tuple[str, str, str]:
    """Key, fact sentence and question."""
    if kind == 0:
        key = f"{rng.choice(words.COLORS)} {rng.choice(words.OBJECTS)}"
        return key, f"The code for the {key} is {words.code(rng)}.", f"What is the code for the {key}"
    if kind == 1:
        key = words.person(rng)
        return key, f"The password of {key} is {words.word(rng)}.", f"What is the password of {key}"
    if kind == 2:
        key = words.person(rng)
        return (
            key,
            f"The favorite fruit of {key} is {rng.choice(words.CATEGORIES['fruit'])}.",
            (f"What is the favorite fruit of {key}"),
        )
    key = rng.choice(words.EXTRA)
    return key, f"The price of the {key} is {rng.randint(2, 999)} dollars.", f"What is the price of the {key}"


def needle(rng: random.Random, split: str, scale: float = 1.0) -> Sample:
    """One of one or two facts in up to about 150 sentences (2,000 tokens); ``scale`` shortens the text."""
    kind = rng.randrange(4)
    facts: dict[str, tuple[str, str]] = {}
    for _ in range(rng.randint(1, 2)):
        key, sentence, asked = _fact(rng, kind if rng.random() < 0.7 else rng.randrange(4))
        facts[key] = (sentence, asked)
    longest = max(4.0, 140 * scale)
    count = int(3 * (longest / 3) ** rng.random())
    sentences = [filler(rng) for _ in range(count)]
    for sentence, _ in facts.values():
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    answer, asked = rng.choice(list(facts.values()))
    ask, text = question(rng, asked), " ".join(sentences)
    form = rng.choice(
        [
            "{t}\n\n{q}",
            "Read the text and answer the question.\n\n{t}\n\nQuestion: {q}",
            "{t}\n\nQuestion: {q}",
            "Text: {t}\n\nQuestion: {q}",
            "Here is a text:\n{t}\n\n{q}",
            "{q}\n\n{t}\n\n{q}",
        ]
    )
    messages = [user(form.format(t=text, q=ask))]
    if rng.random() < 0.1:  # the text came a turn earlier
        messages = [user(text), assistant("Okay, I will remember that."), user(ask)]
    return Sample("needle", messages, answer, thought="I look for it in the text.")


__all__ = ["classify", "extract", "needle", "order", "recall"]
