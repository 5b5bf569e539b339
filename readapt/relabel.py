"""Rows for adapters whose training data is gone: logged prompts, answered by the old service.

What is learned and judged on them is agreement with the old service: a perfect score means that no client of it would
notice the new base. A folder of such data holds `prompts.jsonl` (`{"prompt": ...}` a line) and no other rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.adapter_files import Adapter
from cluster.errors import InvalidDataError
from readapt.data import Encoder, Row, Task, read_lines, text_field
from readapt.greedy import greedy
from readapt.lora import attach

PROMPTS = "prompts.jsonl"
VALID_SHARE, MAX_VALID_ROWS = 0.2, 400
MAX_ANSWER_SHARE = 0.5  # of the tokens that a row may have
BATCH_ROWS = 64


def load_prompts(path: Path) -> list[str]:
    """The distinct prompts of a file of JSON objects, in order; any other fields are left aside.

    InvalidDataError names the file and the line; at least four prompts are needed to learn and to judge.
    """
    prompts = [text_field(fields, "prompt", where) for where, fields in read_lines(path)]
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 4:
        raise InvalidDataError(f"{path}: {len(distinct)} different prompts, at least 4 are needed")
    return distinct


def relabelled(model: Any, old: Adapter, encoder: Encoder, prompts: Sequence[str]) -> Task:
    """The task that the old service, `old` on the bare old base, defines by its greedy answers; no test rows.

    InvalidDataError where it has answers to fewer than four prompts.
    """
    rows = answered(model, old, encoder, prompts)
    if len(rows) < 4:
        raise InvalidDataError(f"the old service answered {len(rows)} of {len(prompts)} prompts, at least 4 are needed")
    num_valid = min(MAX_VALID_ROWS, max(2, round(VALID_SHARE * len(rows))))
    return Task(train=rows[num_valid:], valid=rows[:num_valid], test=[])


def answered(model: Any, old: Adapter, encoder: Encoder, prompts: Sequence[str]) -> list[Row]:
    """The prompts with the old service's greedy answers.

    Left out are prompts that leave no room for an answer, and those whose answer is empty or does not come to an end.
    """
    tokens = {prompt: encoder.encode_prompt(prompt) for prompt in prompts}
    longest = int(MAX_ANSWER_SHARE * encoder.max_tokens)
    fitting = [prompt for prompt in prompts if len(tokens[prompt]) + longest <= encoder.max_tokens]
    lora = attach(model, old)
    try:
        texts = greedy(model, encoder, [tokens[prompt] for prompt in fitting], longest, BATCH_ROWS)
    finally:
        lora.detach()
    rows = [Row(prompt, text) for prompt, text in zip(fitting, texts, strict=True) if text]
    return [row for row in rows if encoder.num_answer_tokens(row.completion) < longest]
