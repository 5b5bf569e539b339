"""Task rows, from their files to tokens: what an adapter is trained and judged on.

A prompt is encoded as the server encodes it for `/v1/completions`, with the tokenizer's own special tokens. An adapter
therefore gets exactly the tokens in service that it was trained on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cluster.adapters.dialect import adapter_dialect, base_dialect
from cluster.errors import InvalidCheckpointError, InvalidDataError
from cluster.registry.records import AdapterRecord, Version
from cluster.storage.jsonl import read_lines
from readapt.training.chats import Chat, Prompt, completion_text, prompt_and_completion, render

AnyT = TypeVar("AnyT")
IGNORED = -100  # the label that torch's cross_entropy skips


@dataclass(frozen=True)
class Row:
    """One example: the right answer to `prompt` is exactly `completion`."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Task:
    """A task's rows. Training uses `train`; search and gate divide `valid` between them; only reports use `test`."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class Encoded:
    """The tokens of a prompt, its completion and end-of-sequence. The first `num_prompt_tokens` are the prompt."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int


@dataclass(frozen=True)
class BatchTensors:
    """Right-padded rows. Labels are aligned with the inputs (not shifted), and -100 outside completion and eos."""

    input_ids_BT: Tensor  # int64
    attention_mask_BT: Tensor  # int64, 1 at tokens
    labels_BT: Tensor  # int64


def load_rows(path: Path) -> list[Row]:
    """Read a file with one row per line: `prompt` and `completion`, or `messages` (see `readapt.training.chats`).

    InvalidDataError, with file and line, if the file is missing or empty, a line is not JSON, or a field is wrong.
    """
    return [Row(*prompt_and_completion(fields, at)) for at, fields in read_lines(path)]


def load_task(folder: Path) -> Task:
    """Read `train.jsonl`, `valid.jsonl` and `test.jsonl` of a task's folder."""
    return Task(*(load_rows(folder / f"{split}.jsonl") for split in ("train", "valid", "test")))


def task_folders(record: AdapterRecord, version: Version) -> tuple[Path, ...]:
    """Return the data folders of everything a version was trained on: the adapter's own, then one per stage.

    InvalidDataError if there are none or if one is missing: losses on unjudged rows would go unnoticed.
    """
    named = [record.data, *(stage["data"] for stage in version.details.get("stages", ()))]
    folders = tuple(Path(folder) for folder in dict.fromkeys(named) if folder)
    if not folders:
        raise InvalidDataError(f"{record.name} has no rows to judge it by: give it `data` in the fleet file.")
    for folder in folders:
        if not folder.is_dir():
            raise InvalidDataError(f"{folder}: no such folder; {version.label} was trained on its rows.")
    return folders


def joined(tasks: Sequence[Task]) -> Task:
    """Return one task with the rows of several, split by split."""
    return Task(
        train=[row for task in tasks for row in task.train],
        valid=[row for task in tasks for row in task.valid],
        test=[row for task in tasks for row in task.test],
    )


class Encoder:
    """Turns rows into tokens, with a Hugging Face `tokenizer`. `max_tokens` limits prompt, completion and eos.

    `eos_id` ends each row. A generated answer ends at any token of `end_ids`, which always include `eos_id`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_id: int, max_tokens: int, end_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.eos_id = eos_id
        self.max_tokens = max_tokens
        self.end_ids = frozenset({eos_id, *end_ids})

    @property
    def end_text(self) -> str:
        """The end-of-sequence token, for messages."""
        return f"{self.tokenizer.convert_ids_to_tokens(self.eos_id)!r} (id {self.eos_id})"

    def encode(self, row: Row) -> Encoded:
        """Encode one row. A prompt that is too long loses its beginning; a completion is never cut.

        InvalidDataError if the row has a `fault`.
        """
        completion = self.encode_completion(row)
        room_tokens = self.max_tokens - len(completion)
        if room_tokens < 1:
            raise InvalidDataError(f"{self._too_long()}: {row.completion[:60]!r} ({len(completion)} tokens)")
        prompt = self.encode_prompt(row.prompt)[-room_tokens:]
        return Encoded((*prompt, *completion), len(prompt))

    def fault(self, row: Row) -> str | None:
        """Return why `encode` refuses a row, or None. Short completions are not tokenised for it."""
        try:
            if isinstance(row.prompt, str):
                _check_unicode(row.prompt)
                _check_unicode(row.completion)
                if len(row.completion.encode()) + 2 <= self.max_tokens:  # a byte is at most one token
                    return None
            else:
                self.encode_prompt(row.prompt)
            return self._too_long() if len(self.encode_completion(row)) >= self.max_tokens else None
        except InvalidDataError as error:
            return str(error)

    def encode_completion(self, row: Row) -> list[int]:
        """Return the tokens of a row's answer, with what its chat template writes before it, and its end token."""
        text = row.completion
        if isinstance(row.prompt, Chat):
            end = str(self.tokenizer.convert_ids_to_tokens(self.eos_id))
            text = completion_text(self.tokenizer, row.prompt, text, end)
        _check_unicode(text)
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id]

    def _too_long(self) -> str:
        return f"a completion leaves no room for its prompt within readapt.train.max_tokens = {self.max_tokens}"

    def encode_all(self, rows: Sequence[Row]) -> list[Encoded]:
        """Encode rows in their order."""
        return [self.encode(row) for row in rows]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens as the server sees them, uncut. InvalidDataError for a prompt without tokens."""
        is_chat = isinstance(prompt, Chat)
        text = render(self.tokenizer, prompt) if isinstance(prompt, Chat) else prompt
        _check_unicode(text)
        tokens = list(self.tokenizer(text, add_special_tokens=not is_chat)["input_ids"])
        if not tokens:
            raise InvalidDataError(f"the prompt {prompt!r} has no tokens")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_unicode(text: str) -> None:
    """Raise InvalidDataError for lone surrogates, which JSON can spell and tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidDataError(f"the text is not valid Unicode: {error.reason}") from error


class EncodedRows(Sequence[Encoded]):
    """Rows that are encoded when they are first used: a short run uses few of many."""

    def __init__(self, encoder: Encoder, rows: Sequence[Row]):
        self._encoder = encoder
        self._rows = rows
        self._encoded: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._encoded:
            self._encoded[index] = self._encoder.encode(self._rows[index])
        return self._encoded[index]


def collate(rows: Sequence[Encoded]) -> BatchTensors:
    """Return a batch of the rows, padded on the right to the longest."""
    width = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.input_ids)
        input_ids_BT[index, : len(tokens)] = tokens
        attention_mask_BT[index, : len(tokens)] = 1
        labels_BT[index, row.num_prompt_tokens : len(tokens)] = tokens[row.num_prompt_tokens :]
    return BatchTensors(input_ids_BT, attention_mask_BT, labels_BT)


def by_length(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return the rows by rising length, so that batches of neighbours need the least padding."""
    return sorted(rows, key=lambda row: len(row.input_ids))


def shuffled_batches(rows: Sequence[AnyT], batch_rows: int, seed: int) -> Iterator[list[AnyT]]:
    """Yield endless batches, each epoch in a new order. A batch may continue from one epoch into the next."""
    assert rows, "files without rows are refused when they are read"
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch_rows:
            queue += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[index] for index in queue[:batch_rows]]
        del queue[:batch_rows]


def encoder_for(base_folder: Path, max_tokens: int, adapter_folder: Path | None = None) -> Encoder:
    """Return the encoder of a checkpoint, or of an adapter on it: its own tokenizer and end tokens count.

    InvalidCheckpointError if the base has no usable tokenizer or no file names an end-of-sequence token;
    InvalidAdapterError if the adapter's tokenizer does not fit the base.
    """
    dialect = base_dialect(base_folder)
    if adapter_folder is not None:
        dialect = adapter_dialect(adapter_folder, dialect)
    if dialect.eos_id is None:
        raise InvalidCheckpointError(f"{base_folder}: names no end-of-sequence token")
    return Encoder(dialect.tokenizer, dialect.eos_id, max_tokens, dialect.end_ids)
