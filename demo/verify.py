"""The check of every answer: was its version in charge of the adapter then, and is the text what it answers?"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.names import parse_model
from cluster.registry.registry import Registry, Status, Version
from demo.load import Answer

IN_CHARGE = (Status.LIVE, Status.CANARY)


@dataclass(frozen=True)
class Term:
    """A period in which a version took traffic, in `time.time()` seconds."""

    version: Version
    start: float
    end: float


def terms(registry: Registry) -> dict[str, list[Term]]:
    """Return the periods in which versions were live or canary, by adapter, from the event log."""
    result: dict[str, list[Term]] = defaultdict(list)
    for version in registry.versions():
        start: float | None = None
        for event in registry.events(version_id=version.id):
            if event.kind not in ("added", "moved"):
                continue
            is_in_charge = event.details["target" if event.kind == "moved" else "status"] in IN_CHARGE
            if is_in_charge and start is None:
                start = event.at
            elif not is_in_charge and start is not None:
                result[version.adapter].append(Term(version, start, event.at))
                start = None
        if start is not None:
            result[version.adapter].append(Term(version, start, float("inf")))
    return result


def wrong_answers(
    answers: Iterable[Answer],
    in_charge: dict[str, list[Term]],
    expected: Callable[[Version, Sequence[str]], list[str]],
    grace_s: float,
) -> list[str]:
    """Return one sentence for each wrong answer.

    An answer is right if two things hold. Its version was in charge at some moment of the request, or up to `grace_s`
    before it: gateways learn of a change by polling, and the old version stays servable. And its text is what
    `expected(version, prompts)` returns, the greedy answers of a second implementation with the same files.
    """
    texts: dict[int, dict[str, str]] = {}
    wrong = []
    groups = defaultdict(list)
    for answer in answers:
        groups[answer.model].append(answer)
    for model, group in groups.items():
        name, number = parse_model(model)
        candidates = [term for term in in_charge.get(name, []) if term.version.number == number]
        if not candidates:
            wrong += [f"{a.adapter}: answered by {model}, which was never in charge" for a in group]
            continue
        version = candidates[0].version
        prompts = sorted({a.prompt for a in group})
        texts[version.id] = dict(zip(prompts, expected(version, prompts), strict=True))
        wrong += [fault for a in group if (fault := _fault(a, candidates, texts[version.id], grace_s))]
    return wrong


def _fault(answer: Answer, candidates: Sequence[Term], texts: dict[str, str], grace_s: float) -> str:
    version = candidates[0].version
    if answer.adapter != version.adapter or answer.base != version.base:
        return f"{answer.adapter}: answered by {answer.model} on {answer.base}"
    if not any(t.start <= answer.done_at and answer.sent_at - grace_s <= t.end for t in candidates):
        return f"{answer.adapter}: answered by {answer.model} while it was not in charge"
    if answer.text != texts[answer.prompt]:
        return f"{answer.model} answered {answer.text!r} to {answer.prompt!r} instead of {texts[answer.prompt]!r}"
    return ""
