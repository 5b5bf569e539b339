"""Measures structured output: whether answers match random JSON Schemas, and what the constraint costs.

    relora bench structured --kit DIR --out FILE.json [--base DIR] [--schemas 1000] [--quick]

Each schema comes with a prompt of the kit's tasks and is answered once, drawn at temperature 0.7. `jsonschema` judges
the answers. An answer cut by `max_tokens` is counted apart.

The overhead compares steps of a full batch that decodes without and with grammars, in turns. It counts CPU seconds of
all threads of the process, because a busy machine stretches wall time.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.facts import facts, write_report
from bench.serving.random_schemas import Schema, random_schema
from cluster.adapters.dialect import Dialect
from cluster.config.settings import GIB, ServingConfig
from cluster.extras import optional_imports
from serving.engine import grammar
from serving.engine.engine import Engine
from serving.engine.masks import Mask, MaskBuilder
from serving.engine.matcher import Matcher
from serving.engine.request import FinishReason, Request, SamplingParams
from serving.model.llama import CausalLM

NUM_SEQUENCES = 32
MAX_TOKENS = 320  # of an answer
TASKS = ("e2e", "snips", "ag_news")  # whose prompts are asked
_NUM_ROUNDS, _NUM_STEPS, _NUM_WARM = 4, 24, 4  # of the overhead: rounds of each arm, steps of a round, steps before


def run(kit: Path, out: Path, base: Path, num_schemas: int, is_quick: bool, console: Console) -> None:
    """Measure both parts, print the figures and write them as JSON."""
    found = {"facts": facts(("torch", "transformers", "llguidance", "jsonschema")), "base": base.name}
    engine = _Engine.open(base, _config())
    asks = _asks(kit, base, num_schemas, engine.max_prompt_tokens)
    found |= _answer_all(engine, asks, console)
    found |= _overhead(engine, asks[:NUM_SEQUENCES], 1 if is_quick else _NUM_ROUNDS)
    write_report(out, found)
    console.print_json(data=found)


class _TimedMasks(MaskBuilder):
    """Measures the microseconds of a row's mask: building it and applying it."""

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self.build_us: list[float] = []
        self.apply_us: list[float] = []

    def build(self, rows: Sequence[int], matchers: Sequence[Matcher]) -> Mask:
        started_at = time.perf_counter()
        mask = super().build(rows, matchers)
        self.build_us.append(1e6 * (time.perf_counter() - started_at) / len(rows))
        return mask

    def apply(self, logits_OV: Tensor, mask: Mask) -> None:
        started_at = time.perf_counter()
        super().apply(logits_OV, mask)
        self.apply_us.append(1e6 * (time.perf_counter() - started_at) / len(mask.rows_O2))


class _Engine(Engine):
    def __init__(self, model: CausalLM, dialect: Dialect, config: ServingConfig):
        super().__init__(model, dialect, config)
        self.masks = self._masks = _TimedMasks(model.ops, model.vocab_size, config.threads)
        self.max_prompt_tokens = self._max_model_tokens - MAX_TOKENS


def _config() -> ServingConfig:
    return ServingConfig(
        memory_bytes=2 * GIB,
        max_sequences=NUM_SEQUENCES,
        max_batch_tokens=512,
        max_queue=2 * NUM_SEQUENCES,
        max_model_tokens=2048,
        prefix_cache="off",
        swap_bytes=0,
    )


Ask = tuple[Schema, tuple[int, ...]]


def _asks(kit: Path, base: Path, num_schemas: int, max_prompt_tokens: int) -> list[Ask]:
    """Return schemas and prompts. A prompt that is too long loses its beginning."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = islice(_texts(kit), num_schemas)
    asks = [(random_schema(seed), text) for seed, text in enumerate(texts)]
    return [(schema, tuple(_prompt(tokenizer, schema, text)[-max_prompt_tokens:])) for schema, text in asks]


def _texts(kit: Path) -> Iterator[str]:
    """Yield different prompts of the tasks in turns."""
    files = [(kit / "tasks" / task / "train.jsonl").read_text().splitlines() for task in TASKS]
    columns = [dict.fromkeys(json.loads(line)["prompt"] for line in lines) for lines in files]
    return chain.from_iterable(zip(*columns, strict=False))


def _prompt(tokenizer: PreTrainedTokenizerBase, schema: Schema, text: str) -> list[int]:
    content = f"{text}\nAnswer with JSON that matches this schema: {json.dumps(schema, ensure_ascii=False)}"
    if not tokenizer.chat_template:
        return list(tokenizer(content + "\nAnswer: ")["input_ids"])
    turns = [{"role": "user", "content": content}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(written, add_special_tokens=False)["input_ids"])


# Validity.


def _answer_all(engine: _Engine, asks: Sequence[Ask], console: Console) -> dict[str, Any]:
    table_ms = _timed_ms(lambda: _compile(engine, _request(0, grammar.choice(["a"]), (0,))))
    compile_ms: list[float] = []
    texts: dict[int, list[str]] = {}
    reasons: dict[int, FinishReason] = {}
    num_tokens, waiting = 0, list(reversed(range(len(asks))))
    while waiting or engine.has_work:
        while waiting and len(texts) - len(reasons) < NUM_SEQUENCES:
            number = waiting.pop()
            schema, prompt = asks[number]
            request = _request(number, grammar.json_schema(schema), prompt, temperature=0.7, seed=number)
            compile_ms.append(_timed_ms(partial(_compile, engine, request)))
            engine.submit(request)
            texts[number] = []
        for event in engine.step():
            if event.error is not None:
                raise event.error
            number = int(event.request_id)
            texts[number].append(event.text)
            num_tokens += len(event.tokens)
            if event.finish_reason is not None:
                reasons[number] = event.finish_reason
                if len(reasons) % 50 == 0:
                    console.print(f"{len(reasons)} of {len(asks)} answers")
    answers = {number: "".join(parts) for number, parts in texts.items() if reasons[number] is FinishReason.STOP}
    faults = {number: fault for number, text in answers.items() if (fault := _fault(asks[number][0], text))}
    return {
        "num_schemas": len(asks),
        "num_cut_by_max_tokens": len(asks) - len(answers),
        "schemas_valid_fraction": 1 - len(faults) / len(answers),
        "faults": faults,
        "mean_answer_tokens": num_tokens / len(asks),
        "mean_prompt_tokens": mean(len(prompt) for _, prompt in asks),
        "tokenizer_table_ms": table_ms,
        "compile_ms": _quantiles(compile_ms),
        "mask_build_us_per_row": _quantiles(engine.masks.build_us),
        "mask_apply_us_per_row": _quantiles(engine.masks.apply_us),
    }


def _request(number: int, form: grammar.Grammar | None, prompt: tuple[int, ...], **sampling: Any) -> Request:
    return Request(str(number), prompt, SamplingParams(**{"max_tokens": MAX_TOKENS, **sampling}, grammar=form))


def _compile(engine: Engine, request: Request) -> None:
    compiling = engine.start_matcher(request)
    assert compiling is not None, "the request has a grammar"
    compiling.result()


def _fault(schema: Schema, text: str) -> str:
    """Return why an answer does not match its schema, or "" if it does."""
    with optional_imports():
        import jsonschema
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {error}"
    return ""


# Overhead.


def _overhead(engine: _Engine, asks: Sequence[Ask], num_rounds: int) -> dict[str, Any]:
    """Return the CPU milliseconds of a decode step without and with grammars. Each row has a grammar of its own."""
    forms = [grammar.json_schema(_endless(schema)) for schema, _ in asks]
    prompts = [prompt[:64] for _, prompt in asks]
    steps_ms: dict[bool, list[float]] = {False: [], True: []}
    for is_constrained in (False, True) * num_rounds:
        steps_ms[is_constrained] += _decode_ms(engine, prompts, forms if is_constrained else [None] * len(forms))
    plain, constrained = median(steps_ms[False]), median(steps_ms[True])
    return {
        "batch": len(asks),
        "step_ms_plain": plain,
        "step_ms_structured": constrained,
        "structured_overhead_fraction": constrained / plain - 1,
    }


def _endless(schema: Schema) -> Schema:
    """Return the schema of a list that no answer completes. Its definitions stay at the root, where references look."""
    items = {key: value for key, value in schema.items() if key != "$defs"}
    return {"type": "array", "items": items, "minItems": 1000, "$defs": schema.get("$defs", {})}


def _decode_ms(
    engine: Engine, prompts: Sequence[tuple[int, ...]], forms: Sequence[grammar.Grammar | None]
) -> list[float]:
    requests = [
        _request(number, form, prompt, temperature=0.0, ignore_eos=True)
        for number, (prompt, form) in enumerate(zip(prompts, forms, strict=True))
    ]
    for request in requests:
        engine.submit(request)
    has_token: set[str] = set()
    while len(has_token) < len(requests):
        has_token |= {event.request_id for event in engine.step()}
    for _ in range(_NUM_WARM):
        engine.step()
    steps_ms = [_timed_ms(engine.step, time.process_time) for _ in range(_NUM_STEPS)]
    for request in requests:
        engine.abort(request.id)
    return steps_ms


def _timed_ms(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started_at = clock()
    work()
    return 1e3 * (clock() - started_at)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": median(ordered), "p95": ordered[int(0.95 * len(ordered))], "max": ordered[-1]}
