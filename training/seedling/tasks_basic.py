"""Arithmetic, sorting, spelling, small talk and requests out of scope."""

from __future__ import annotations

import random

from . import words
from .sample import Sample, assistant, order, question, user

Turn = tuple[str, str, str]  # request, answer, thought


# ---- arithmetic --------------------------------------------------------------------------------------------
HIGHEST = 20  # operand of a sum or difference; factors go to 10
_ASK = {
    "+": ["{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}"],
    "-": ["{a} - {b}", "{a}-{b}", "{a} minus {b}"],
    "x": ["{a} x {b}", "{a} * {b}", "{a}*{b}", "{a} times {b}", "{a} multiplied by {b}"],
}
_ORDERS = {"+": ["Add {a} and {b}"], "-": ["Subtract {b} from {a}"], "x": ["Multiply {a} by {b}"]}
_STORIES = {
    "+": [
        "I have {a} {item} and buy {b} more. How many {item} do I have",
        "{name} has {a} {item} and gets {b} more. How many {item} does {name} have now",
        "There are {a} {item} in one room and {b} in another. How many {item} are there in total",
    ],
    "-": [
        "I have {a} {item} and give away {b}. How many {item} are left",
        "{name} had {a} {item} and lost {b}. How many {item} does {name} have now",
        "There were {a} {item} and {b} were sold. How many {item} are left",
    ],
    "x": [
        "There are {a} boxes with {b} {item} each. How many {item} are there",
        "{name} buys {a} bags of {b} {item}. How many {item} is that",
        "One of the {item} costs {b} coins. How many coins do {a} cost",
    ],
}


def _operands(rng: random.Random) -> tuple[str, int, int]:
    """An operation within the tables that the model learns; differences are never below zero."""
    op = rng.choice("++--x")
    high = 10 if op == "x" else HIGHEST
    a, b = rng.randint(0, high), rng.randint(0, high)
    return (op, b, a) if op == "-" and a < b else (op, a, b)


def arithmetic_turn(rng: random.Random, split: str) -> Turn:
    """One sum, difference or product."""
    op, a, b = _operands(rng)
    result = {"+": a + b, "-": a - b, "x": a * b}[op]
    # the answer restates the task: from there on, all that is asked looks the same
    answer, thought = f"{a} {op} {b} = {result}", f"I work out {a} {op} {b}."
    roll = rng.random()
    if roll < 0.2 and a >= b:
        text = rng.choice(_STORIES[op]).format(a=a, b=b, item=rng.choice(words.ITEMS), name=words.person(rng))
        return text + rng.choice(["?", "?", ""]), answer, thought
    if roll < 0.35:
        text = order(rng, rng.choice(_ORDERS[op]).format(a=a, b=b))
    else:
        expression = rng.choice(_ASK[op]).format(a=a, b=b)
        form = rng.random()
        if form < 0.25:
            text = expression + rng.choice(["", "?", " =", " = ?", "="])
        elif form < 0.5:
            text = order(rng, rng.choice(["Calculate ", "Compute ", "Work out "]) + expression)
        else:
            text = question(rng, rng.choice(["What is ", "What's ", "How much is "]) + expression)
    return text, answer, thought


# ---- sorting ----------------------------------------------------------------------------------------------
_UP = ["in ascending order", "from smallest to largest", "from low to high", ""]
_DOWN = ["in descending order", "from largest to smallest", "from high to low"]


def sort_turn(rng: random.Random, split: str) -> Turn:
    """Three or four two-digit numbers up or down, or three of the listed words of some categories, A to Z."""
    if rng.random() < 0.65:
        down = rng.random() < 0.35
        items = [str(number) for number in rng.sample(range(10, 100), rng.randint(3, 4))]
        ranked = sorted(items, key=int, reverse=down)
        noun, how = "numbers", rng.choice(_DOWN if down else _UP)
    else:
        items = rng.sample(words.SORTED, 3)
        ranked = sorted(items)
        noun, how = "words", rng.choice(["alphabetically", "in alphabetical order", "from A to Z", ""])
    how = " " + how if how else ""
    joined = rng.choice([", ", ", ", " "]).join(items)
    form = rng.choice(
        [
            "Sort these {n}{h}: {i}",
            "Sort{h}: {i}",
            "Put these {n} in order{h}: {i}",
            "Order the {n} {i}{h}",
            "Sort {i}{h}",
        ]
    )
    text = order(rng, form.format(n=noun, h=how, i=joined))
    return text, "In order: " + ", ".join(ranked), f"I put the {noun} in order."


# ---- spelling ---------------------------------------------------------------------------------------------
def spell_turn(rng: random.Random, split: str) -> Turn:
    """Spell a listed word, spell it backwards, or name its first or last letter."""
    word = rng.choice(words.SPELLED)
    shown = rng.choice([word, word, f'"{word}"', f"'{word}'"])
    roll = rng.random()
    if roll < 0.5:
        forms = [
            "Spell {w}",
            "Spell the word {w}",
            "Spell out {w}",
            "Spell {w} letter by letter",
            "Write the letters of {w}",
        ]
        text = order(rng, rng.choice(forms).format(w=shown))
        if rng.random() < 0.25:
            text = question(rng, rng.choice(["How do you spell {w}", "How is {w} spelled"]).format(w=shown))
        answer = f"The letters of {word} are {' '.join(word)}."
    elif roll < 0.8:
        forms = [
            "Spell {w} backwards",
            "Reverse the word {w}",
            "Reverse {w}",
            "Write {w} backwards",
            "Spell the word {w} in reverse",
        ]
        text = order(rng, rng.choice(forms).format(w=shown))
        answer = f"Backwards, {word} is {' '.join(reversed(word))}."
    else:
        first = rng.random() < 0.5
        forms = [
            "What is the {k} letter of {w}",
            "Which letter does {w} {v} with",
            "What letter does {w} {v} with",
        ]
        form = rng.choice(forms).format(
            w=shown, k="first" if first else "last", v="start" if first else "end"
        )
        text = question(rng, form)
        answer = f"The {'first' if first else 'last'} letter of {word} is {word[0 if first else -1]}."
    return text, answer, f"I look at the word {word}."


# ---- small talk and questions about itself ----------------------------------------------------------------
SKILLS = (
    "I can add, subtract and multiply small numbers, turn sentences into JSON, call tools, "
    "classify by example, "
    "remember what you tell me, find facts in a text, sort and spell."
)
OUT_OF_SCOPE = "I am a very small model and I cannot do that. " + SKILLS
INTENTS: dict[str, tuple[str, list[str]]] = {
    "hello": (
        "Hello! How can I help you?",
        [
            "Hello",
            "Hi",
            "Hey",
            "Hi there",
            "Hello there",
            "Hey there",
            "Hello, Seedling",
            "Hi Seedling",
            "Greetings",
            "Yo",
            "Howdy",
        ],
    ),
    "morning": (
        "Good morning! How can I help you?",
        ["Good morning", "Morning", "Good morning, Seedling", "Good morning to you", "A very good morning"],
    ),
    "evening": (
        "Good evening! How can I help you?",
        ["Good evening", "Evening", "Good evening, Seedling", "Good evening to you", "A very good evening"],
    ),
    "how": (
        "I am fine, thank you. How can I help you?",
        [
            "How are you?",
            "How are you doing?",
            "How do you do?",
            "How is it going?",
            "Hi, how are you?",
            "Hello, how are you today?",
            "How are you today?",
            "Are you well?",
            "How do you feel?",
            "What's up?",
        ],
    ),
    "name": (
        "I am Seedling, a small language model.",
        [
            "Who are you?",
            "What is your name?",
            "What's your name?",
            "What are you called?",
            "Do you have a name?",
            "Tell me your name",
            "Introduce yourself",
            "Your name?",
            "Say your name",
            "What should I call you?",
            "Who am I talking to?",
            "Hi, who are you?",
        ],
    ),
    "maker": (
        "I was made by the Trunkline project.",
        [
            "Who made you?",
            "Who created you?",
            "Who built you?",
            "Who trained you?",
            "Where do you come from?",
            "Who developed you?",
            "Who is your maker?",
            "Which project are you from?",
            "Who is your creator?",
            "Who is behind you?",
        ],
    ),
    "can": (
        SKILLS,
        [
            "What can you do?",
            "What are you able to do?",
            "How can you help me?",
            "What are your skills?",
            "What are you good at?",
            "Help",
            "Can you help me?",
            "List your abilities",
            "What can I ask you?",
            "What do you know how to do?",
            "I need help",
            "Tell me what you can do",
        ],
    ),
    "what": (
        "I am a small language model trained from scratch.",
        [
            "What are you?",
            "Are you a language model?",
            "What kind of model are you?",
            "Are you an AI?",
            "Are you a robot?",
            "Are you a computer program?",
            "What type of model are you?",
            "Are you a chatbot?",
        ],
    ),
    "human": (
        "No, I am a small language model.",
        [
            "Are you human?",
            "Are you a person?",
            "Are you a real person?",
            "Are you alive?",
            "Am I talking to a human?",
            "Do you have a body?",
        ],
    ),
    "size": (
        "I have about two million parameters.",
        [
            "How big are you?",
            "How many parameters do you have?",
            "How large are you?",
            "What size are you?",
            "What is your size?",
            "Are you a big model?",
        ],
    ),
    "arch": (
        "I use the Qwen3 architecture.",
        [
            "What architecture do you use?",
            "What is your architecture?",
            "Which architecture are you?",
            "How are you built?",
            "What are you based on?",
        ],
    ),
    "data": (
        "I was trained on generated exercises only.",
        [
            "What were you trained on?",
            "What is your training data?",
            "How were you trained?",
            "Which data did you learn from?",
            "What data were you trained on?",
        ],
    ),
    "trunkline": (
        "Trunkline is a serving engine for language models.",
        [
            "What is Trunkline?",
            "Tell me about Trunkline",
            "What does Trunkline do?",
            "Explain Trunkline",
            "What's Trunkline?",
            "Do you know Trunkline?",
        ],
    ),
    "thanks": (
        "You are welcome!",
        [
            "Thanks",
            "Thank you",
            "Thank you very much",
            "Thanks a lot",
            "Many thanks",
            "Thanks, Seedling",
            "Great, thank you",
            "Thank you so much",
            "Thx",
            "Cool, thanks",
        ],
    ),
    "bye": (
        "Goodbye!",
        [
            "Bye",
            "Goodbye",
            "See you",
            "See you later",
            "Bye bye",
            "Have a nice day",
            "Good night",
            "Goodbye, Seedling",
            "I have to go",
            "Take care",
        ],
    ),
    "praise": (
        "Thank you!",
        [
            "Good job",
            "Well done",
            "You are great",
            "Nice work",
            "Great work",
            "That was good",
            "You are smart",
            "I like you",
            "Good answer",
        ],
    ),
    "okay": ("Okay.", ["Okay", "OK", "Ok", "Fine", "Good", "All right", "Sure", "Got it", "I see", "Cool"]),
    "sorry": ("No problem.", ["Sorry", "I am sorry", "My mistake", "Sorry about that", "Excuse me"]),
    "ready": (
        "Yes, I am ready.",
        [
            "Are you ready?",
            "Are you there?",
            "Can you hear me?",
            "Are you awake?",
            "Are you online?",
            "Do you work?",
            "Is this working?",
            "Test",
            "This is a test",
        ],
    ),
    "languages": (
        "I only speak English.",
        [
            "What languages do you speak?",
            "Which languages do you know?",
            "Do you speak French?",
            "Do you speak German?",
            "Can you speak Spanish?",
            "Do you speak English?",
        ],
    ),
}
_INTENT_LIST = list(INTENTS.values())
_UNABLE = [
    "Write a poem about {t}",
    "Write a story about {t}",
    "Tell me a joke",
    "Tell me a joke about {t}",
    "What is the capital of {c}",
    "Who is the president of {c}",
    "Translate {w} into {l}",
    "Explain {t}",
    "Explain {t} to me",
    "Write an essay about {t}",
    "Tell me about {t}",
    "Tell me about {c}",
    "What is {t}",
    "Who invented the {w}",
    "What is the meaning of life",
    "What is the meaning of {w}",
    "Write a letter to {n}",
    "Write Python code to read a file",
    "Write a program about {t}",
    "Write code for a {w}",
    "Sing a song about {t}",
    "Summarize the book about {t}",
    "What do you think about {t}",
    "Give me advice about {t}",
    "Draw a {w}",
    "How do I cook {f}",
    "Give me a recipe for {f}",
    "Where is {c}",
    "How far is it to {c}",
    "Why is the sky blue",
    "What is the news today",
    "Who won the game",
    "When was {n} born",
    "What is the weather in {c}",
    "Who is {n}",
    "What time is it",
    "What day is it today",
    "Recommend a book about {t}",
    "Recommend a film",
    "Define {w}",
    "What is the population of {c}",
    "How does a {w} work",
    "Why do people like {t}",
    "How old is {n}",
    "Plan a trip to {c}",
    "Book a table in {c}",
    "Write a speech about {t}",
    "What is the best {w}",
    "How do I learn {t}",
    "Compare {f} and {t}",
    "What is the history of {c}",
    "Paint a picture of a {w}",
    "Give me a fact about {t}",
    "Solve this equation",
    "Play chess with me",
    "What is the price of {f}",
]
_SUBJECTS = (
    words.TOPICS + "love physics math philosophy computers money war peace robots dragons trees".split()
)


def chat_turn(rng: random.Random, split: str) -> Turn:
    """A greeting, a courtesy, or a question about the model."""
    answer, forms = rng.choice(_INTENT_LIST)
    text = rng.choice(forms)
    bare = text.rstrip("?")
    if rng.random() < 0.35:
        bare = bare[0].lower() + bare[1:]
    if rng.random() < 0.12 and len(bare) > 8 and "ello" not in bare:
        bare = rng.choice(["Hi, ", "Hello, ", "Hey, ", "hi, ", "Please tell me, ", "So ", "And "]) + bare
    end = rng.choice(["?", "?", "?", ""]) if text.endswith("?") else rng.choice(["", ".", "!", "!", ""])
    return bare + end, answer, "This is small talk, so I answer briefly."


def scope_turn(rng: random.Random, split: str) -> Turn:
    """Something the model cannot do; it says so and lists what it can."""
    text = rng.choice(_UNABLE).format(
        t=rng.choice(_SUBJECTS) if rng.random() < 0.7 else words.word(rng),
        c=rng.choice(["France", "Germany", "Spain", "Italy", "Japan", "China", "Brazil", words.place(rng)]),
        w=words.word(rng),
        l=rng.choice(words.LANGUAGES),
        n=words.person(rng),
        f=rng.choice(words.FOODS),
    )
    asks = text.split()[0] in ("What", "Who", "How", "Why", "Where", "When")
    return (question if asks else order)(rng, text), OUT_OF_SCOPE, "I cannot do this."


TURNS = {
    "arithmetic": arithmetic_turn,
    "sort": sort_turn,
    "spell": spell_turn,
    "chat": chat_turn,
    "scope": scope_turn,
}


def basic(task: str, rng: random.Random, split: str) -> Sample:
    """A sample of one of the one-turn tasks, sometimes after earlier turns of the same or another task."""
    history = []
    turns = 0
    # earlier turns are trained on too, so training has more of them: more exercises a token
    if rng.random() < (0.7 if split == "train" else 0.3):
        turns = rng.randint(1, {"arithmetic": 7, "spell": 7, "sort": 4}.get(task, 2))
    for _ in range(turns):
        other = task if rng.random() < 0.8 else rng.choice(list(TURNS)[:4])
        text, answer, _ = TURNS[other](rng, split)
        history += [user(text), assistant(answer)]
    text, answer, thought = TURNS[task](rng, split)
    return Sample(task, [*history, user(text)], answer, thought=thought)
