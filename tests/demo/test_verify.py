"""The check of the answers must catch a wrong version and a wrong text, or it would prove nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.registry.registry import Registry, Status, Version
from demo.load import Answer
from demo.verify import terms, wrong_answers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def history(tmp_path: Path):
    """greet@1 live on v1 from 100 to 200; greet@2 canary on v2 from 190 and live from 200."""
    clock = Clock()
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}", clock=clock)
    registry.add_base("v1", "a", "one")
    registry.add_base("v2", "b", "two")
    registry.add_adapter("greet")
    registry.add_version("greet", "v1", Status.LIVE, blob_key="old")
    version = registry.add_version("greet", "v2", Status.PLANNED)
    for source, target in zip(
        (Status.PLANNED, Status.ADAPTING, Status.CANDIDATE, Status.READY),
        (Status.ADAPTING, Status.CANDIDATE, Status.READY, Status.CANARY),
        strict=True,
    ):
        clock.now = 190.0 if target is Status.CANARY else 150.0
        registry.move(version.id, source, target)
    clock.now = 200.0
    registry.promote(version.id)
    yield terms(registry)
    registry.close()


def expected(version: Version, prompts) -> list[str]:
    return [f"{prompt} from {version.base}" for prompt in prompts]


def answer(number: int, at: float, **changes) -> Answer:
    base = {1: "v1", 2: "v2"}[number]
    right = Answer("greet", "hi", at, at + 0.1, at + 0.2, f"greet@{number}", base, f"hi from {base}")
    return replace(right, **changes)


def test_terms_come_from_the_event_log(history):
    spans = [(t.version.number, t.start, t.end) for t in history["greet"]]
    assert spans == [(1, 100.0, 200.0), (2, 190.0, float("inf"))]


@pytest.mark.parametrize("right", [answer(1, 120.0), answer(1, 195.0), answer(2, 195.0), answer(2, 300.0)])
def test_versions_in_charge_are_right(history, right):
    assert wrong_answers([right], history, expected, grace_s=1.0) == []


def test_a_request_that_began_before_the_switch_may_end_on_the_old_version(history):
    late = replace(answer(1, 199.9), done_at=230.0)
    assert wrong_answers([late], history, expected, grace_s=1.0) == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (answer(1, 250.0), "while it was not in charge"),
        (answer(2, 120.0), "while it was not in charge"),
        (answer(2, 300.0, text="hi from v1"), "instead of"),
        (answer(2, 300.0, base="v1"), "answered by greet@2 on v1"),
        (answer(2, 300.0, adapter="other"), "other: answered by"),
        (answer(2, 300.0, model="greet@7"), "was never in charge"),
    ],
)
def test_wrong_answers_are_named(history, wrong, why):
    faults = wrong_answers([answer(1, 120.0), wrong], history, expected, grace_s=1.0)
    assert len(faults) == 1
    assert why in faults[0]
