"""The demo's tasks: rows made from templates and words. Each prompt is unique and in only one split.

A prompt ends with a cue (" =>"). The specialist must write the completion and then stop. The words of `demo.lexicon`
fill the `{slots}` of a template. There are far more fillings than rows, so held-out prompts are new.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.storage.jsonl import write_lines
from demo.lexicon import fill

CUE = " =>"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Task:
    """One task: how to draw a row, how answers are judged, and what the specialist's adapter looks like."""

    name: str
    draw: Callable[[random.Random], tuple[str, str]]
    metric: Literal["exact_match", "chrf"] = "exact_match"
    rank: int = 8
    is_rslora: bool = False
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_POLITE = ("", "", "", "please ", "hey, ", "could you ", "i would like you to ", "ok, ")
_TAILS = ("", "", "", " thanks", " now", " for me", " if you can", " as soon as possible")
_INTENTS = {
    "play music": ("play some {music}", "put on {music} in the {room}", "i want to hear {music} with {name}"),
    "set alarm": (
        "wake me at {number} on {day}",
        "set the alarm for {number}",
        "get me out of bed at {number} in the {part}",
    ),
    "get weather": (
        "will there be {weather} in {city}",
        "tell me the forecast for {city} on {day}",
        "do i need a coat for {city}",
    ),
    "book table": (
        "book a table for {number} at {venue}",
        "reserve a place at {venue} on {day}",
        "get us dinner at {venue}",
    ),
    "send message": (
        "tell {name} that i am {mood}",
        "write to {name} about the {thing}",
        "let {name} know i am at the {place}",
    ),
    "call person": ("call {name}", "ring {name} at {number}", "get {name} on the line this {part}"),
    "buy ticket": (
        "buy a ticket to {city}",
        "i need a seat to {city} on {day}",
        "book the train from {city} to {city2}",
    ),
    "add item": ("add {fruit} to my list", "we need more {fruit} and {fruit2}", "put {food} on the shopping list"),
    "find route": (
        "how do i get to the {place}",
        "show the way from the {place} to the {place2}",
        "take me to {venue}",
    ),
    "give recipe": ("how is {food} made", "show me how to cook {food} with {fruit}", "what goes into {cuisine} {food}"),
    "switch device": (
        "turn on the {device}",
        "switch off the {device} in the {room}",
        "make the {device} in the {room} {colour}",
    ),
    "tell joke": ("say something funny about a {animal}", "make {name} laugh", "i am {mood}, cheer me up"),
    "check balance": (
        "what is on my {money} account",
        "how much is left from {month}",
        "did the {money} of {name} arrive",
    ),
    "cancel order": (
        "i do not want the {colour} {thing} any more",
        "stop the order of {fruit}",
        "send the {thing} back",
    ),
    "read news": ("what is new about the {law}", "read me the {sport} page", "anything from {city} in the papers"),
    "start timer": (
        "count down {number} minutes",
        "give the {food} {number} minutes",
        "tell me when {number} minutes are over",
    ),
    "rate visit": (
        "give {venue} {number} points",
        "the {aspect} at {venue} gets {number} stars",
        "write that {venue} is {good}",
    ),
    "feed pet": (
        "give the {animal} some {fruit}",
        "has the {animal} eaten this {part}",
        "fill the bowl of the {colour} {animal}",
    ),
    "teach word": ("what does {mood} mean", "spell {cuisine}", "how do you say {thing} in {cuisine}"),
    "find thing": ("where is my {colour} {thing}", "i have lost the {thing}", "look for the {thing} in the {room}"),
}
_PRAISE = (
    "the {aspect} was {good}",
    "i found the {aspect} {good}",
    "the {aspect} was not {bad}",
    "what a {good} {aspect}",
)
_BLAME = (
    "the {aspect} was {bad}",
    "i found the {aspect} {bad}",
    "the {aspect} was not {good}",
    "what a {bad} {aspect}",
)
_NEITHER = (
    "the {aspect} was {plain}",
    "i found the {aspect} {plain}",
    "it was a {plain} {aspect}",
    "just a {plain} {aspect}",
)
_OPINIONS = {"positive": _PRAISE, "negative": _BLAME, "neutral": _NEITHER}
_VISITS = ("at {venue}, {}", "{} at {venue}", "on {day} {}", "we went to {venue} on {day} and {}", "{name} said: {}")
_NEWS = (
    "the {0} and the {1} were in the news in {city}",
    "{name} spoke about the {0} on {day} {part}",
    "in {city} a {job} saw the {0}, the {1} and the {thing}",
    "the {colour} {thing} of {name} is about the {0} and the {1}",
    "{month} in {city}: the {0} is back after {number} days",
)
_TOPICS = ("sport", "money", "science", "health", "law", "school")
_QUESTIONS = {
    "person": (
        "who {verb} to the {place} in {city}",
        "what is the name of the {job}",
        "which {job} lost the {colour} {thing}",
    ),
    "place": ("where is the {thing} of {name}", "in which city did {name} eat {food}", "where does the {animal} sleep"),
    "time": (
        "when does the train leave {city}",
        "on what day did {name} see the {animal}",
        "at what time is the {music} at {venue}",
    ),
    "count": ("how many {fruit} did {name} buy", "how many rooms are at {venue}", "what number of days has {month}"),
    "reason": ("why is {name} {mood}", "for what reason did the {animal} run", "why was the {aspect} {bad}"),
    "colour": (
        "what colour is the {thing}",
        "is the {thing} {colour} or {colour2}",
        "which colour has the {device} of {name}",
    ),
}
_DEPARTMENTS = {
    "billing": (
        "the {money} on my card is {bad}",
        "i paid {number} times for the {thing}",
        "my {money} of {month} is not right",
    ),
    "delivery": (
        "the {thing} for {name} is not here",
        "my box went to {city}, not {city2}",
        "when will the {colour} {thing} come",
    ),
    "technical": (
        "the {device} in the {room} does not work",
        "the {device} is stuck on {colour}",
        "no sound from the {device}",
    ),
    "account": ("i can not log in as {name}", "change my name to {name}", "my password is lost since {day}"),
}
_URGENCY = {
    "urgent": ("at once please", "i can not wait", "it is an emergency", "i need it before {number}"),
    "normal": ("thanks and bye", "there is no hurry", "any day of {month} will do", "whenever you like"),
}
_MEETINGS = (
    "meet {name} at the {place} at {number}",
    "{name} and {name2} wait at the {place} on {day}",
    "on {day} {part} we all go to the {place} in {city}",
    "is there a {price} {cuisine} restaurant near the {place}",
    "the {place} of {city} has a {colour} door",
    "i lost my {colour} {thing} at the {place}",
    "{city}, {place}, {day} at {number}",
)
_ORDERS = {
    "on": (
        "turn on the {device} in the {room}",
        "i want the {device} to run at {number}",
        "start the {colour} {device}",
    ),
    "off": ("switch off the {device} in the {room}", "i am {mood}, no more {device}", "stop the {device} on {day}"),
}


def _intent(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(list(_INTENTS))
    return rng.choice(_POLITE) + fill(rng.choice(_INTENTS[label]), rng)[0] + rng.choice(_TAILS), label


def _sentiment(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(list(_OPINIONS))
    opinion = rng.choice(_OPINIONS[label])
    return fill(rng.choice(_VISITS).replace("{}", opinion), rng)[0], label


def _topic(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(_TOPICS)
    template = rng.choice(_NEWS).replace("{0}", f"{{{label}}}").replace("{1}", f"{{{label}2}}")
    return fill(template, rng)[0], label


def _question(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(list(_QUESTIONS))
    return rng.choice(("", "", "tell me, ", "{name} asks: ".format(name=fill("{name}", rng)[0]))) + fill(
        rng.choice(_QUESTIONS[label]), rng
    )[0], label


def _support(rng: random.Random) -> tuple[str, str]:
    department = rng.choice(list(_DEPARTMENTS))
    urgency = rng.choice(list(_URGENCY))
    parts = [fill(rng.choice(_DEPARTMENTS[department]), rng)[0], fill(rng.choice(_URGENCY[urgency]), rng)[0]]
    rng.shuffle(parts)
    return ". ".join(parts), f"{department} {urgency}"


def _place(rng: random.Random) -> tuple[str, str]:
    text, words = fill(rng.choice(_MEETINGS), rng)
    return rng.choice(_POLITE) + text + rng.choice(_TAILS), words["place"]


def _device(rng: random.Random) -> tuple[str, str]:
    state = rng.choice(list(_ORDERS))
    text, words = fill(rng.choice(_ORDERS[state]), rng)
    return rng.choice(_POLITE) + text + rng.choice(_TAILS), f"{words['device']} {state}"


def _describe(rng: random.Random) -> tuple[str, str]:
    text, words = fill("food {cuisine}, open {day}, name {venue}, near {place}", rng)
    return text, "{cuisine} food is served at {venue}".format(**words)


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TASKS = (
    Task("intent", _intent),
    Task("sentiment", _sentiment, rank=4),
    Task("describe", _describe, metric="chrf", rank=16, is_rslora=True),
    Task("place", _place, rank=16),
    Task("topic", _topic, rank=8, modules=("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")),
    Task("question", _question, rank=4),
    Task("support", _support, rank=8),
    Task("device", _device, rank=16, modules=(*_ATTENTION, "down_proj")),
)


def make_rows(task: Task, sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Draw the rows of each split (`sizes`: rows by split). No prompt comes twice, within a split or across splits."""
    rng = random.Random(f"{task.name}/{seed}")
    drawn: dict[str, str] = {}
    while len(drawn) < sum(sizes.values()):
        text, answer = task.draw(rng)
        drawn.setdefault(text + CUE, answer)
    rows = iter([{"prompt": prompt, "completion": answer} for prompt, answer in drawn.items()])
    return {split: [next(rows) for _ in range(size)] for split, size in sizes.items()}


def write_rows(folder: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    """Write `folder`/SPLIT.jsonl, one row per line."""
    for split, lines in rows.items():
        write_lines(folder / f"{split}.jsonl", lines)
