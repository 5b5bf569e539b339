"""A base model's checkpoint in Hugging Face's layout, read one tensor at a time.

A folder may hold several sets of weights: one file, an index with shards, variants, pickled files. `open_checkpoint`
alone decides which of them count. They are those that transformers loads, because readapt trains on its models. Only
safetensors files are opened, because pickled weights can run code.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import InvalidCheckpointError

log = logging.getLogger(__name__)

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
# The weights' file names, first choice first. transformers prefers the single file, diffusers the index.
_CHOICES = (_WEIGHTS, _INDEX, f"diffusion_pytorch_{_INDEX}", f"diffusion_pytorch_{_WEIGHTS}")
_ADAPTER_CONFIG = "adapter_config.json"
_LINEAR = re.compile(r"(.*\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))\.weight")
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
# The files that determine the token ids if there is no tokenizer.json (older, "slow" tokenizers).
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A checkpoint folder whose headers have been read and checked; the tensors stay on disk until they are loaded."""

    def __init__(self, folder: Path, config: dict[str, Any], entries: Mapping[str, _Entry]):
        self.folder = folder
        self.config = config
        self._entries = dict(sorted(entries.items()))

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data; InvalidCheckpointError if there is no such tensor."""
        return self._entry(name).shape

    def load(self, name: str) -> Tensor:
        """Read one tensor to the CPU in its stored dtype; InvalidCheckpointError if there is no such tensor."""
        return _load(name, self._entry(name))

    def weight(self, name: str) -> Tensor | None:
        """Return a tensor by the name that the model class uses, or None: a tied head is the embedding."""
        stored = f"{_EMBEDDING}.weight" if name == f"{_HEAD}.weight" and name not in self._entries else name
        return self.load(stored) if stored in self._entries else None

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of the seven linear modules of each layer, by module path without `.weight`."""
        matches = ((_LINEAR.fullmatch(name), entry.shape) for name, entry in self._entries.items())
        return {match[1]: (shape[0], shape[1]) for match, shape in matches if match is not None and len(shape) == 2}

    def adaptable_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of all modules that a served adapter may change: the linear ones, the embedding, the head.

        An embedding's input is one-hot, so its shape is that of the transposed table. A tied head is listed too.
        """
        table = self._entries.get(f"{_EMBEDDING}.weight")
        if table is None or len(table.shape) != 2:
            return self.linear_shapes()
        vocab, hidden = table.shape
        return {**self.linear_shapes(), _EMBEDDING: (hidden, vocab), _HEAD: (vocab, hidden)}

    def fingerprint(self) -> str:
        """Return a SHA-256 over all names, dtypes, shapes and bytes; it does not depend on the sharding."""
        digest = hashlib.sha256()
        for name, entry in self._entries.items():
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
            digest.update(_bytes(name, entry).numpy())
        return digest.hexdigest()

    def stamp(self) -> str:
        """Return a SHA-256 over the weight files' names, sizes and modification times, which is faster to compute."""
        files = sorted({entry.file for entry in self._entries.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def tokenizer_fingerprint(self) -> str:
        """Return a SHA-256 over the tokenizer; equal fingerprints mean that texts get the same token ids.

        The padding and truncation settings in tokenizer.json do not count: they are what the last program left there.
        """
        fast = self.folder / "tokenizer.json"
        if fast.is_file():
            content = _read_json(fast)
            decisive = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
            return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        files = [self.folder / name for name in _SLOW_TOKENIZER_FILES if (self.folder / name).is_file()]
        if not files:
            raise InvalidCheckpointError(f"{self.folder}: no tokenizer (tokenizer.json) next to the weights.")
        return _hash_files(files)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise InvalidCheckpointError(f"{self.folder}: the checkpoint has no tensor {name!r}.")
        return self._entries[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a Hugging Face checkpoint folder, single-file or sharded, with the weights that transformers would load.

    Reads the header of every file. So a missing shard, a truncated file or a tensor that the index lists but no shard
    has raises InvalidCheckpointError here, not in the middle of loading. A folder that also holds an adapter is
    refused: transformers would add the adapter to the weights.
    """
    if not folder.is_dir():
        raise InvalidCheckpointError(f"{folder}: no such checkpoint folder.")
    config = _read_json(folder / _CONFIG)
    if (folder / _ADAPTER_CONFIG).exists():
        raise InvalidCheckpointError(
            f"{folder}: an adapter ({_ADAPTER_CONFIG}) lies beside the base's weights, and transformers would add it "
            "to them. Move the adapter into its own folder."
        )
    file = _weights_file(folder, config)
    if file.name.endswith(".index.json"):
        return Checkpoint(folder, config, _sharded_entries(file))
    return Checkpoint(folder, config, _file_entries(file))


def _weights_file(folder: Path, config: Mapping[str, Any]) -> Path:
    """Return the file or the index that holds the weights. `transformers_weights` in config.json may name it."""
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise InvalidCheckpointError(f"{folder}: transformers_weights in {_CONFIG} is not a safetensors file.")
        return _inside(folder, named)
    found = [folder / name for name in _CHOICES if (folder / name).is_file()]
    if not found:
        raise InvalidCheckpointError(f"{folder}: neither {_WEIGHTS} nor {_INDEX} exists.{_hint(folder)}")
    if len(found) > 1:
        ignored = ", ".join(file.name for file in found[1:])
        log.warning("%s: the weights are read from %s; ignored: %s", folder, found[0].name, ignored)
    return found[0]


def _hint(folder: Path) -> str:
    variants = sorted(file.name for file in folder.glob("model.*.safetensors*"))
    if variants:
        return f" {variants[0]} is a variant: rename it to {_WEIGHTS} to use it."
    pickled = any(folder.glob("pytorch_model*.bin"))
    return " Pickled weights (pytorch_model.bin) are not read." if pickled else ""


def _inside(folder: Path, name: str, kind: str = "") -> Path:
    """Return a file of the folder or of its subfolders. InvalidCheckpointError if it is missing or elsewhere."""
    file = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
        raise InvalidCheckpointError(f"{folder}: {kind}{name!r} is missing.")
    return file


def _sharded_entries(index: Path) -> dict[str, _Entry]:
    """Return all tensors of all shards that the index names, also those that its list lacks, as transformers does."""
    folder = index.parent
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidCheckpointError(f"{index}: no 'weight_map' from tensor names to shard files.")
    shards = {shard: _file_entries(_inside(folder, shard, "shard ")) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise InvalidCheckpointError(
                f"{folder}: the index lists tensor {name!r} in shard {shard!r}, but the shard does not have it."
            )
    stored: dict[str, _Entry] = {}
    for entries in shards.values():
        _check_equal(stored, entries)
        stored |= entries
    return stored


def _check_equal(stored: Mapping[str, _Entry], entries: Mapping[str, _Entry]) -> None:
    """Raise InvalidCheckpointError if two shards have different tensors of one name: no reader may have to choose."""
    for name in sorted(stored.keys() & entries.keys()):
        first, second = stored[name], entries[name]
        if first.dtype != second.dtype or not torch.equal(_bytes(name, first), _bytes(name, second)):
            raise InvalidCheckpointError(
                f"{first.file.parent}: {first.file.name!r} and {second.file.name!r} have different tensors {name!r}. "
                "One of them belongs to another checkpoint."
            )


def _load(name: str, entry: _Entry) -> Tensor:
    try:
        with safe_open(entry.file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpointError(f"{entry.file}: tensor {name!r} cannot be read: {error}") from error


def _bytes(name: str, entry: _Entry) -> Tensor:
    """Return a tensor's bytes, flat."""
    return _load(name, entry).contiguous().flatten().view(torch.uint8)


def _file_entries(file: Path) -> dict[str, _Entry]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            return {name: _Entry(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpointError(f"{file}: truncated or not a safetensors file: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InvalidCheckpointError(f"{file.parent}: {file.name} is missing.") from error
    except (OSError, ValueError) as error:
        raise InvalidCheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpointError(f"{file}: expected a JSON object.")
    return content


def _hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
