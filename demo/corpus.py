"""The training text of the demo's base models: stories and a manual for v1, programs for v2.

Stories are made here; the manual and the programs come with every Python. A document is one string, and the trainer
ends each with the end-of-text token. The same seed and Python version give the same documents.
"""

import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics as manual

from demo.lexicon import LEXICON, fill

_OPENINGS = (
    "once upon a time there was a {mood} {job} named {name}.",
    "one {part} {name} the {job} was very {mood}.",
    "there was a little {animal} who lived near the {place} of {city}.",
    "{name} and {name2} were friends and lived in {city}.",
    "it was {day} {part} in {month} and {name} had {number} {fruit}.",
)
_SCENES = (
    "{name} {verb} to the {place} with a {colour} {thing}.",
    "the {animal} saw a {colour} {thing} near the {place} and was {mood}.",
    "{name} asked {name2} for the {thing}. {name2} said yes and gave {name} the {thing}.",
    "they ate {food} and {fruit} in the {room}. the {food} was {good}.",
    "the {food} at {venue} was {bad}, so {name} went home {mood}.",
    "then came the {weather}, and the {animal} ran into the {room}.",
    "{name} took the train from {city} to {city2} on {day}. {city2} was {good}.",
    "the {job} had a {device} in the {room}. it was {colour} and {plain}.",
    "{name} wanted to play {music} but the {device} was {bad}.",
    "at {number} the {job} went to {venue}, a {price} {cuisine} place by the {place}.",
    "the {sport} was {good} and the {sport2} was {bad}, said {name}.",
    "the {money} went up and the {money2} went down in {city}.",
    "{name} read about the {science} and the {science2} at school.",
    "the doctor spoke of {health} and {health2}, and {name} felt {mood}.",
    "the {law} and the {law2} were in the news on {day}.",
    "the {school} was about the {school2}, and the {job} was {mood}.",
    "the {aspect} was not {bad} but the {aspect2} was {plain}.",
    "the {aspect} was {good}, and {name} smiled.",
    "the {aspect} was {bad}, and {name} was angry.",
    "the {aspect} was {plain}, and {name} said nothing.",
)
_ENDINGS = (
    "in the end {name} was {mood} and everybody went home.",
    "and so the {animal} and {name} became friends.",
    "that {part} they all slept well.",
    "the {thing} was {colour} again and all was {good}.",
)
_TALK = (
    "{name}: where is the {thing}?\n{name2}: the {thing} is in the {room}.",
    "{name}: who is at the {place}?\n{name2}: {name3} the {job} is at the {place}.",
    "{name}: when do you go to {city}?\n{name2}: i go to {city} on {day} at {number}.",
    "{name}: how many {fruit} do we have?\n{name2}: we have {number} {fruit}.",
    "{name}: please turn on the {device} in the {room}.\n{name2}: the {device} is on now.",
    "{name}: can you play some {music}?\n{name2}: yes, here is {music}.",
    "{name}: was the {aspect} {good}?\n{name2}: no, the {aspect} was {bad}.",
    "{name}: why are you {mood}?\n{name2}: because of the {weather} in {month}.",
    "{name}: what colour is the {thing}?\n{name2}: it is {colour}, not {colour2}.",
)
_FACTS = (
    "{name} went from {city} to {city2} on {day} at {number}.",
    "the {device} in the {room} is {colour} and the {thing} is {colour2}.",
    "{venue} is a {price} {cuisine} place near the {place}.",
    "{name} the {job} gave {number} {fruit} to {name2} in the {room}.",
)
_CARDS = (
    (
        "name {venue}, food {cuisine}, price {price}, near {place}.",
        "{venue} is a {price} {cuisine} place near the {place}.",
    ),
    ("from {city}, to {city2}, day {day}, time {number}.", "on {day} at {number} {name} went from {city} to {city2}."),
    ("room {room}, device {device}, colour {colour}.", "the {device} in the {room} is {colour}."),
    ("buy {fruit}, {fruit2} and {food} for {name}.", "{name} wants {food}, {fruit2} and {fruit}."),
)
_MODULES = [
    "argparse",
    "ast",
    "asyncio.base_events",
    "bdb",
    "calendar",
    "cmd",
    "codecs",
    "collections",
    "configparser",
    "contextlib",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email.message",
    "enum",
    "fractions",
    "ftplib",
    "functools",
    "gettext",
    "gzip",
    "heapq",
    "http.client",
    "http.server",
    "imaplib",
    "inspect",
    "ipaddress",
    "json.decoder",
    "locale",
    "logging",
    "mailbox",
    "mimetypes",
    "optparse",
    "os",
    "pathlib",
    "pdb",
    "pickle",
    "pickletools",
    "platform",
    "plistlib",
    "pprint",
    "pydoc",
    "queue",
    "random",
    "shelve",
    "shlex",
    "smtplib",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "tokenize",
    "traceback",
    "typing",
    "unittest.case",
    "urllib.request",
    "uuid",
    "weakref",
    "xml.dom.minidom",
    "xmlrpc.client",
    "zipfile",
]


def _story(rng: random.Random) -> str:
    # The whole story has the same hero and friend: names that return teach the model to copy.
    hero, friend = rng.sample(LEXICON["name"], 2)
    lines = [rng.choice(_OPENINGS), *rng.sample(_SCENES, rng.randint(2, 5)), rng.choice(_ENDINGS)]
    text = " ".join(line.replace("{name}", hero).replace("{name2}", friend) for line in lines)
    return _filled_by_sentence(text, rng)


def _filled_by_sentence(text: str, rng: random.Random) -> str:
    return ". ".join(fill(sentence, rng)[0] for sentence in text.split(". "))


def _talk(rng: random.Random) -> str:
    return "\n".join(fill(template, rng)[0] for template in rng.sample(_TALK, rng.randint(1, 3)))


def _card(rng: random.Random) -> str:
    # A card and its sentence, in either order: this teaches the model to carry words over.
    card = list(rng.choice(_CARDS))
    rng.shuffle(card)
    return fill("\n".join(card), rng)[0]


def _recall(rng: random.Random) -> str:
    # A fact, then some of its words by kind, in any order: this teaches the model to find words again.
    text, words = fill(rng.choice(_FACTS), rng)
    asked = rng.sample(sorted(words), rng.randint(2, len(words)))
    return f"{text}\n" + ", ".join(f"{slot} {words[slot]}" for slot in asked) + "."


def _echo(rng: random.Random) -> str:
    # The same random words repeated: only copying predicts them, so a small model learns to copy.
    words = " ".join(rng.choice(LEXICON[kind]) for kind in rng.choices(list(LEXICON), k=rng.randint(3, 10)))
    return "\n".join([words] * rng.randint(2, 4))


def stories(num_chars: int, seed: int) -> list[str]:
    """Return stories, talk, cards and facts, at least `num_chars` characters in total: most of the text of base v1."""
    rng = random.Random(seed)
    return _until(num_chars, lambda: rng.choice((_story, _talk, _card, _card, _recall, _echo))(rng))


def prose(num_chars: int, seed: int) -> list[str]:
    """Return pieces of Python's own manual, at least `num_chars` characters in total."""
    rng = random.Random(seed)
    sources = sorted(manual.topics.values())
    return _until(num_chars, lambda: _piece(rng.choice(sources), rng))


def programs(num_chars: int, seed: int) -> list[str]:
    """Return pieces of Python's own library, at least `num_chars` characters in total: most of the text of base v2."""
    rng = random.Random(seed)
    sources = [_source(module) for module in _MODULES]
    return _until(num_chars, lambda: _piece(rng.choice(sources), rng))


def _source(module: str) -> str:
    path = Path(sysconfig.get_path("stdlib"), *module.split("."))
    # Some modules, such as pathlib, become packages in a later Python version.
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text("utf-8")


def _piece(text: str, rng: random.Random, max_chars: int = 1500) -> str:
    start = rng.randrange(max(1, len(text) - max_chars))
    return text[start : start + max_chars]


def _until(num_chars: int, make: Callable[[], str]) -> list[str]:
    documents: list[str] = []
    total = 0
    while total < num_chars:
        documents.append(make())
        total += len(documents[-1])
    return documents
