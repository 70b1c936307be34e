"""Word lists and made-up names of the data generator; all written for this project."""

from __future__ import annotations

import random

CATEGORIES: dict[str, list[str]] = {
    "animal": "dog cat horse cow pig sheep goat mouse rabbit lion tiger bear wolf fox duck hen".split(),
    "fruit": "apple pear plum cherry banana orange lemon grape melon peach mango fig kiwi lime".split(),
    "color": "red blue green yellow black white brown purple pink gray violet golden silver".split(),
    "vehicle": "car bus train truck bike boat ship plane tram van taxi scooter ferry rocket".split(),
    "clothing": "shirt hat coat shoe sock glove scarf dress skirt belt jacket boot sweater cap".split(),
    "job": "doctor teacher baker farmer nurse pilot cook lawyer painter judge miner tailor sailor".split(),
    "tool": "hammer saw drill wrench shovel rake axe knife pliers screwdriver chisel ladder".split(),
    "furniture": "chair table bed sofa desk shelf lamp bench stool drawer cabinet mirror".split(),
    "weather": "rain snow wind storm sun fog cloud thunder hail frost mist breeze".split(),
    "sport": "tennis soccer golf hockey boxing rowing chess skiing rugby judo swimming cycling".split(),
}
GOOD = "great good lovely wonderful amazing nice fantastic excellent perfect brilliant superb fun".split()
BAD = "bad awful terrible boring horrible poor dreadful ugly nasty weak broken disappointing".split()
REVIEWED = "film book meal hotel song game trip show phone play party class".split()
EXTRA = (
    "river stone house garden window bridge paper pencil bottle basket button candle castle circle corner "
    "desert dragon engine family feather flower forest friend hunter island jungle kettle kitchen letter "
    "market meadow mountain needle number ocean pepper planet pocket potato rabbit ribbon school shadow "
    "spring summer sunset ticket tomato valley village winter yogurt zebra bread butter cheese honey milk "
    "sugar water salt rice soup cake music dance story dream light night morning evening yellow street road"
).split()
WORDS = sorted({word for words in CATEGORIES.values() for word in words} | set(EXTRA))
CLASSES = ["animal", "fruit", "color", "vehicle", "clothing", "job", "furniture"]  # told apart by example
SORTED = [
    word for group in ("animal", "fruit", "color", "clothing", "furniture") for word in CATEGORIES[group]
]
SAID = [word for group in ("animal", "fruit", "color") for word in CATEGORIES[group]]
SPELLED = [word for word in WORDS if len(word) <= 8]

GIVEN = (
    "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor "
    "Wendy Alice Bob Carol Dan Eve Maria Peter John Mary Tom Lucy Max Nina Oscar Sara Julia Karl Laura Mark"
).split()
PLACES = (
    "Oslo Paris London Berlin Rome Madrid Lisbon Vienna Prague Tokyo Kyoto Cairo Lima Boston Denver Dublin "
    "Athens Warsaw Helsinki Zurich Geneva Milan Munich Seoul Delhi Sydney Toronto Chicago Moscow Hamburg"
).split()
JOBS = CATEGORIES["job"]
COLORS = CATEGORIES["color"]
ITEMS = (
    "apples pens books chairs lamps cups shirts tickets bottles boxes hats candles towels plates keys".split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
TOPICS = "music sports history science art travel cooking nature space gardening health politics".split()
OBJECTS = "door box safe locker gate chest cabinet vault garage shed cellar drawer".split()
PETS = "dog cat horse parrot rabbit hamster turtle goldfish".split()
FOODS = "pizza pasta rice soup salad bread cheese pancakes curry noodles chocolate sushi".split()
LANGUAGES = "French German Spanish Italian Polish Dutch Greek Turkish Japanese Swedish".split()
ROOMS = "kitchen bedroom bathroom office hallway garage cellar attic".split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br dr fl gr kr pl st tr sh th ch".split()
_VOWELS = "a e i o u a e i o ai ee ou".split()
_CODAS = ["", "", "", "", "n", "r", "l", "s", "m", "k", "t"]


def made_up(rng: random.Random, low: int = 2, high: int = 3) -> str:
    """A lowercase word of random syllables, so that it can only be copied, not remembered."""
    count = rng.randint(low, high)
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))


def person(rng: random.Random) -> str:
    """A given name, mostly made up."""
    return rng.choice(GIVEN) if rng.random() < 0.3 else made_up(rng, 1, 3).capitalize()


def place(rng: random.Random) -> str:
    """A town, mostly made up."""
    return rng.choice(PLACES) if rng.random() < 0.35 else made_up(rng, 2, 3).capitalize()


def word(rng: random.Random) -> str:
    """A common or a made-up word."""
    return rng.choice(SORTED) if rng.random() < 0.5 else made_up(rng, 2, 3)


def code(rng: random.Random) -> str:
    """A code of digits, or of capitals and digits."""
    if rng.random() < 0.6:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return letters + "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 3)))


def clock(rng: random.Random) -> str:
    """A time of day such as ``7:30``."""
    return f"{rng.randint(0, 23)}:{rng.choice(['00', '15', '30', '45', '05', '10', '20', '40', '50'])}"
