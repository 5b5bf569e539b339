"""Rows for adapters whose training data is lost: logged prompts, answered by the old adapter on the old base.

Training and evaluation on such rows measure agreement with the old service. A perfect score means that its clients
would not notice the new base. A folder of such data holds `prompts.jsonl`, one `{"prompt": ...}` or logged chat request
(`{"messages": [...]}`) per line, and no `train.jsonl`.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cluster.adapters.files import Adapter
from cluster.errors import InvalidDataError
from cluster.storage.jsonl import read_lines
from readapt.training.causal_lm import CausalLM
from readapt.training.chats import Prompt, prompt_of
from readapt.training.data import Encoder, Row, Task, load_rows
from readapt.training.greedy import Answer, greedy_answers
from readapt.training.lora import attached

PROMPTS = "prompts.jsonl"
VALID_SHARE, MAX_VALID_ROWS = 0.2, 400
MAX_ANSWER_SHARE = 0.5  # of a row's tokens
BATCH_ROWS = 64


def is_data_free(folder: Path) -> bool:
    """Return whether a task's folder has only prompts, which the old adapter has to answer."""
    return (folder / PROMPTS).is_file() and not (folder / "train.jsonl").is_file()


def check_rows(folder: Path) -> None:
    """Raise InvalidDataError, with file and line, if a folder lacks the rows or prompts that an upgrade needs."""
    if not folder.is_dir():
        raise InvalidDataError(f"{folder}: no such folder")
    if is_data_free(folder):
        load_prompts(folder / PROMPTS)
        return
    for split in ("train", "valid"):
        load_rows(folder / f"{split}.jsonl")


def load_prompts(path: Path) -> list[Prompt]:
    """Return the distinct prompts of a JSON-lines file, in order. Other fields are ignored.

    Raises InvalidDataError, with file and line, for malformed lines and for fewer than four prompts.
    """
    prompts = [prompt_of(fields, where) for where, fields in read_lines(path)]
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 4:
        raise InvalidDataError(f"{path}: has {len(distinct)} different prompts, but at least 4 are needed")
    return distinct


def prompts_to_answer(folders: Sequence[Path], max_per_folder: int | None = None) -> list[Prompt]:
    """Return the distinct prompts of those folders that have only prompts. See `load_prompts` for the errors."""
    prompts = [p for folder in folders if is_data_free(folder) for p in load_prompts(folder / PROMPTS)[:max_per_folder]]
    return list(dict.fromkeys(prompts))


def relabelled(model: CausalLM, old: Adapter, encoder: Encoder, prompts: Sequence[Prompt]) -> Task:
    """Return the task defined by the greedy answers of `old` on `model`, the bare old base. It has no test rows.

    The validation rows are drawn at random, because logs may be sorted. Raises InvalidDataError if there are answers
    to fewer than four prompts.
    """
    answers = _answers(model, old, encoder, prompts)
    rows = _whole_rows(answers)
    if len(rows) < 4:
        num_open = sum(not answer.is_finished for answer in answers.values())
        raise InvalidDataError(
            f"the old adapter answered {len(rows)} of {len(prompts)} prompts, but at least 4 answers are needed; "
            f"{len(prompts) - len(answers)} prompts cannot be rendered or leave no room for an answer of "
            f"{_max_answer_tokens(encoder)} tokens within readapt.train.max_tokens = {encoder.max_tokens}; {num_open} "
            f"answers do not end with {encoder.end_text}. If the adapter was trained with another end token, put the "
            "tokenizer files that it was trained with beside its weights."
        )
    rows = random.Random(0).sample(rows, len(rows))
    num_valid = min(MAX_VALID_ROWS, max(2, round(VALID_SHARE * len(rows))))
    return Task(train=rows[num_valid:], valid=rows[:num_valid], test=[])


def answered(model: CausalLM, old: Adapter, encoder: Encoder, prompts: Sequence[Prompt]) -> list[Row]:
    """Return the prompts with the greedy answers of `old`.

    Prompts that leave no room for an answer are left out, and so are empty answers and answers that do not end.
    """
    return _whole_rows(_answers(model, old, encoder, prompts))


def _answers(model: CausalLM, old: Adapter, encoder: Encoder, prompts: Sequence[Prompt]) -> dict[Prompt, Answer]:
    fitting = _fitting(encoder, prompts)
    with attached(model, old):
        answers = greedy_answers(model, encoder, list(fitting.values()), _max_answer_tokens(encoder), BATCH_ROWS)
    return dict(zip(fitting, answers, strict=True))


def _whole_rows(answers: Mapping[Prompt, Answer]) -> list[Row]:
    return [Row(prompt, answer.text) for prompt, answer in answers.items() if answer.text and answer.is_finished]


def _max_answer_tokens(encoder: Encoder) -> int:
    return int(MAX_ANSWER_SHARE * encoder.max_tokens)


def _fitting(encoder: Encoder, prompts: Sequence[Prompt]) -> dict[Prompt, list[int]]:
    """Return the tokens of the prompts that can be rendered and leave room for the longest answer."""
    most = encoder.max_tokens - _max_answer_tokens(encoder)
    fitting = {}
    for prompt in prompts:
        with suppress(InvalidDataError):
            tokens = encoder.encode_prompt(prompt)
            if len(tokens) <= most:
                fitting[prompt] = tokens
    return fitting
