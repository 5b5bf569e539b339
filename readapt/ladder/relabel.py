"""Rows for adapters whose training data is gone: logged prompts, answered by the old service.

What is learned and judged on them is agreement with the old service: a perfect score means that no client of it would
notice the new base. A folder of such data holds `prompts.jsonl` (`{"prompt": ...}` a line) and no `train.jsonl`.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from cluster.adapter_files import Adapter
from cluster.errors import InvalidDataError
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoder, Row, Task, load_rows, read_lines, text_field
from readapt.training.greedy import greedy_answers
from readapt.training.lora import attached

PROMPTS = "prompts.jsonl"
VALID_SHARE, MAX_VALID_ROWS = 0.2, 400
MAX_ANSWER_SHARE = 0.5  # of the tokens that a row may have
BATCH_ROWS = 64


def is_data_free(folder: Path) -> bool:
    """Whether a task's folder has only prompts that the old service is to answer, and no rows with true answers."""
    return (folder / PROMPTS).is_file() and not (folder / "train.jsonl").is_file()


def check_rows(folder: Path) -> None:
    """InvalidDataError, with file and line, where a folder has not the rows or prompts that an upgrade will need."""
    if not folder.is_dir():
        raise InvalidDataError(f"{folder}: no such folder")
    if is_data_free(folder):
        load_prompts(folder / PROMPTS)
        return
    for split in ("train", "valid"):
        load_rows(folder / f"{split}.jsonl")


def load_prompts(path: Path) -> list[str]:
    """The distinct prompts of a file of JSON objects, in order; any other fields are left aside.

    InvalidDataError names the file and the line; at least four prompts are needed to learn and to judge.
    """
    prompts = [text_field(fields, "prompt", where) for where, fields in read_lines(path)]
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 4:
        raise InvalidDataError(f"{path}: {len(distinct)} different prompts, at least 4 are needed")
    return distinct


def relabelled(model: CausalLM, old: Adapter, encoder: Encoder, prompts: Sequence[str]) -> Task:
    """The task that the old service, `old` on the bare old base, defines by its greedy answers; no test rows.

    Which rows are for validation does not depend on the prompts' order, which logs may have sorted. InvalidDataError
    where it has answers to fewer than four prompts.
    """
    rows = answered(model, old, encoder, prompts)
    if len(rows) < 4:
        num_long = len(prompts) - len(_fitting(encoder, prompts))
        raise InvalidDataError(
            f"the old service answered {len(rows)} of {len(prompts)} prompts, at least 4 are needed; {num_long} "
            f"prompts leave no room for {_longest_answer(encoder)} tokens of answer within {encoder.max_tokens}"
        )
    rows = random.Random(0).sample(rows, len(rows))
    num_valid = min(MAX_VALID_ROWS, max(2, round(VALID_SHARE * len(rows))))
    return Task(train=rows[num_valid:], valid=rows[:num_valid], test=[])


def answered(model: CausalLM, old: Adapter, encoder: Encoder, prompts: Sequence[str]) -> list[Row]:
    """The prompts with the old service's greedy answers.

    Left out are prompts that leave no room for an answer, and those whose answer is empty or does not come to an end.
    """
    fitting = _fitting(encoder, prompts)
    with attached(model, old):
        answers = greedy_answers(model, encoder, list(fitting.values()), _longest_answer(encoder), BATCH_ROWS)
    pairs = zip(fitting, answers, strict=True)
    return [Row(prompt, answer.text) for prompt, answer in pairs if answer.text and answer.is_finished]


def _longest_answer(encoder: Encoder) -> int:
    return int(MAX_ANSWER_SHARE * encoder.max_tokens)


def _fitting(encoder: Encoder, prompts: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of those prompts that leave room for the longest answer."""
    tokens = {prompt: encoder.encode_prompt(prompt) for prompt in prompts}
    return {p: ids for p, ids in tokens.items() if len(ids) + _longest_answer(encoder) <= encoder.max_tokens}
