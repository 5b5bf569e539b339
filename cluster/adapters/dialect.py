"""How a base or an adapter reads and writes text: its tokenizer, chat template and end tokens.

What lies beside an adapter's weights counts before what lies beside its base:

    tokenizer      the adapter's. It may add and rename special tokens, but each ordinary token keeps the base's id
    chat template  `chat_template.jinja` or the template in `tokenizer_config.json`
    end tokens     `eos_token_id` of `generation_config.json`, and the end-of-sequence token of `tokenizer_config.json`

A folder that lacks one of these takes it from the base.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.errors import InvalidAdapterError, InvalidCheckpointError, ReloraError
from cluster.storage.blobs import BlobStore

# Files that determine token ids. An adapter that has one of them has its own tokenizer.
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
)
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"
TEXT_FILES = (*_VOCABULARY_FILES, _TOKENIZER_CONFIG, "special_tokens_map.json", _TEMPLATE, _GENERATION_CONFIG)
"""The files beside an adapter's weights that make its dialect. They are part of the adapter."""

DIALECT = "dialect"
"""The key of a version's details that has the blob of its text files, if they differ from its base's."""

_NUM_BASES = 4  # whose tokenizers stay loaded


@dataclass(frozen=True, eq=False)
class Dialect:
    """How one base, or one adapter on it, reads and writes text. `folder` is the base's.

    `tokenizer` has the chat template. `eos_id` ends the answers that the model is trained on; None if no file names an
    end token. `end_ids` end a generated answer; they include `eos_id`.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    eos_id: int | None
    end_ids: frozenset[int]

    def shares_vocabulary(self, other: "Dialect") -> bool:
        """Whether both tokenizers are one in memory, but for their templates: so it is without vocabulary files."""
        own, theirs = (getattr(one.tokenizer, "backend_tokenizer", None) for one in (self, other))
        return own is not None and own is theirs


def base_dialect(folder: Path) -> Dialect:
    """Return a base's dialect. InvalidCheckpointError if it has no usable tokenizer.

    Its end tokens come from generation_config.json, else config.json, else the tokenizer.
    """
    files = (folder / name for name in (*TEXT_FILES, "config.json"))
    stamp = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    return _base_dialect(folder, stamp)


@lru_cache(maxsize=_NUM_BASES)
def _base_dialect(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> Dialect:
    """Load a base's dialect; `stamp` tells its present files from earlier ones."""
    tokenizer = _load(folder, InvalidCheckpointError)
    configured = (_configured_ends(folder / name) for name in (_GENERATION_CONFIG, "config.json"))
    ends = next((ids for ids in configured if ids), [])
    if not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    return Dialect(folder, tokenizer, ends[0] if ends else None, frozenset(ends))


def adapter_dialect(folder: Path, base: Dialect) -> Dialect:
    """Return the dialect of the adapter whose files are in `folder`, on a base; the base's own if it brings nothing.

    Raises InvalidAdapterError if its tokenizer cannot be used, or does not fit the base: see `check_tokenizer`.
    """
    if not own_files(folder, base.folder):
        return base
    tokenizer = _own_tokenizer(folder, base)
    check_tokenizer(folder, tokenizer, base)
    configured = _configured_ends(folder / _GENERATION_CONFIG)
    end_ids = frozenset(configured) or base.end_ids
    eos_id = configured[0] if configured else base.eos_id
    # An end token is the adapter's own only if it differs: trainers save the base's tokenizer beside most adapters, and
    # many bases end with another token than their tokenizer says.
    own_eos = tokenizer.eos_token_id
    if own_eos is not None and own_eos != base.tokenizer.eos_token_id:
        eos_id, end_ids = own_eos, end_ids | {own_eos}
    num_rows = _num_rows(base.folder)
    if num_rows is not None and end_ids and max(end_ids) >= num_rows:
        raise InvalidAdapterError(f"{folder}: its end token {max(end_ids)} is beyond the base's {num_rows} token ids.")
    return Dialect(base.folder, tokenizer, eos_id, end_ids)


def own_files(folder: Path, base: Path) -> list[Path]:
    """Return the text files beside an adapter that are not the same as the base's."""
    files = (folder / name for name in TEXT_FILES if (folder / name).is_file())
    return [file for file in files if not _is_same(file, base / file.name)]


def keep_text_files(source: Path, folder: Path) -> None:
    """Copy the text files beside one adapter to the folder of another that is made from it."""
    for name in TEXT_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def store_dialect(blobs: BlobStore, folder: Path, base: Path) -> dict[str, str]:
    """Store an adapter's text files as a blob of their own, and return the entry of the version's details.

    Gateways and engines then fetch an adapter's text files without its weights, and adapters with the same files share
    them. The entry is empty if the base's files say the same.
    """
    if not own_files(folder, base):
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        keep_text_files(folder, Path(scratch))
        return {DIALECT: blobs.put_folder(Path(scratch))}


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base: Dialect) -> None:
    """Raise InvalidAdapterError if an adapter's tokenizer does not fit the base.

    Ordinary tokens with other ids mean that it was trained on another base. A token beyond the base's embedding has no
    meaning; only the padding token, which no answer has, may be there.
    """
    moved = moved_tokens(base.tokenizer, tokenizer)
    if moved:
        token, (old, new) = next(iter(moved.items()))
        raise InvalidAdapterError(
            f"{folder}: its tokenizer does not fit the base in {base.folder}: {len(moved)} tokens have other ids or "
            f"are missing, such as {token!r} ({old}, here {'none' if new is None else new}). The adapter was trained "
            "for another base."
        )
    num_rows = _num_rows(base.folder)
    beyond = sorted(
        token
        for token, id in tokenizer.get_vocab().items()
        if num_rows is not None and id >= num_rows and id != tokenizer.pad_token_id
    )
    if beyond:
        raise InvalidAdapterError(
            f"{folder}: its tokenizer has {len(beyond)} tokens, such as {beyond[0]!r}, with ids beyond the base's "
            f"{num_rows} embeddings. Merge the resized embeddings into a base, or remove these tokens."
        )


def moved_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[str, tuple[int, int | None]]:
    """Return the ordinary tokens of `old` that have another id in `new`, with both ids; None if the token is missing.

    Special tokens may change their names, as reserved ones do once they are used.
    """
    now = new.get_vocab()
    moved = {token: (id, now.get(token)) for token, id in ordinary_tokens(old).items() if now.get(token) != id}
    return dict(sorted(moved.items()))


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of the tokens that are neither special nor added."""
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    return {token: id for token, id in tokenizer.get_vocab().items() if token not in special}


def _own_tokenizer(folder: Path, base: Dialect) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an adapter, with its chat template or else the base's."""
    if {file.name for file in own_files(folder, base.folder)} <= {_TEMPLATE, _GENERATION_CONFIG}:
        tokenizer = copy.copy(base.tokenizer)  # it shares the vocabulary, which may be large
        if (folder / _TEMPLATE).is_file():
            tokenizer.chat_template = (folder / _TEMPLATE).read_text(encoding="utf-8")
        return tokenizer
    with _overlay(folder, base.folder) as both:
        tokenizer = _load(both, InvalidAdapterError, folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = base.tokenizer.chat_template
    return tokenizer


@contextmanager
def _overlay(folder: Path, base: Path) -> Iterator[Path]:
    """Make a folder with the base's text files, replaced by those beside the adapter."""
    hidden: set[str] = set()
    if any((folder / name).is_file() for name in _VOCABULARY_FILES):
        hidden.update(_VOCABULARY_FILES)
    if "chat_template" in _read_json(folder / _TOKENIZER_CONFIG):
        hidden.add(_TEMPLATE)  # transformers prefers this file
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: base / name for name in ("config.json", *TEXT_FILES) if name not in hidden}
        files |= {name: folder / name for name in TEXT_FILES if (folder / name).is_file()}
        for name, file in files.items():
            if file.is_file():
                os.symlink(file.resolve(), Path(scratch) / name)
        yield Path(scratch)


def _load(files: Path, error_type: type[ReloraError], named: Path | None = None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(files)
    except Exception as error:  # the tokenizers library raises plain Exceptions for bad files
        raise error_type(f"{named or files}: has no usable tokenizer: {error}") from error


def _configured_ends(file: Path) -> list[int]:
    """Return a file's `eos_token_id` as a list; empty if it has none."""
    eos = _read_json(file).get("eos_token_id")
    return [int(id) for id in eos] if isinstance(eos, list) else [] if eos is None else [int(eos)]


def _num_rows(base: Path) -> int | None:
    return _read_json(base / "config.json").get("vocab_size")


def _read_json(file: Path) -> Mapping[str, Any]:
    """Return a file's JSON object; an empty one if the file is missing."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"{file}: not readable as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _is_same(file: Path, other: Path) -> bool:
    """Return whether two files have the same content; JSON files may be written differently."""
    if not other.is_file():
        return False
    ours, theirs = file.read_bytes(), other.read_bytes()
    if ours == theirs:
        return True
    return file.suffix == ".json" and _read_json(file) == _read_json(other) != {}
