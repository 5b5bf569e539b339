"""The files of an extraction: one part per tensor, and the adapters and the remainder that are written from the parts.

A part is `NNNNN.safetensors` with the factors and `NNNNN.json` with the facts, which is written last. Adapters are
written from the parts tensor by tensor, because the writer of safetensors needs all tensors in memory.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from readapt.extraction.anatomy import Anatomy, Kind, Place
from readapt.lowrank.spectra import Spectrum
from readapt.training.causal_lm import CausalLM

REMAINDER = "remainder.safetensors"
NEW_ROWS = ".new_rows"
ADAPTER_PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Status(StrEnum):
    """What happened to a tensor."""

    EQUAL = "equal"
    CARRIED = "carried"
    REMAINDER = "remainder"
    LEFT_OUT = "left out"


@dataclass
class Part:
    """The facts of one tensor. Only its extractor changes them, before they are written.

    `shape` is the base's. If the vocabulary has grown or shrunk, only the shared rows are compared. `base_total` is the
    squared norm of the base weight. `spectrum` holds the singular values that were computed.
    """

    index: int
    path: str
    status: Status
    shape: tuple[int, ...]
    places: tuple[Place, ...] = ()
    reason: str = ""
    num_new_rows: int = 0
    num_cut_rows: int = 0
    base_total: float = 0.0
    spectrum: Spectrum | None = None
    is_exact: bool = True
    gap_bound: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return the facts as JSON."""
        return json.dumps(vars(self), default=vars)

    @staticmethod
    def of_json(text: str) -> "Part":
        """Read the facts from the result of `to_json`."""
        facts = json.loads(text)
        spectrum = facts["spectrum"]
        if spectrum is not None:
            facts["spectrum"] = Spectrum(tuple(spectrum["values"]), spectrum["total"], spectrum["cost"])
        facts["places"] = tuple(Place(place["module"], Kind(place["kind"])) for place in facts["places"])
        return Part(**{**facts, "status": Status(facts["status"]), "shape": tuple(facts["shape"])})


@dataclass(frozen=True)
class Extraction:
    """A finished extraction: its folder, each rule's adapter folder and ranks, and the facts of each tensor.

    `num_capped` has for each rule the number of modules that would have a rank above the cap `max_rank`.
    """

    folder: Path
    adapters: dict[str, Path]
    ranks: dict[str, dict[str, int]]
    parts: list[Part]
    anatomy: Anatomy
    num_capped: dict[str, int] = field(default_factory=dict)
    max_rank: int | None = None


def write_part(folder: Path, part: Part, tensors: dict[str, Tensor]) -> None:
    """Write one tensor's part. It counts once its facts are written."""
    if tensors:
        entries = [
            Entry(name, tuple(t.shape), t.dtype, partial(tensors.__getitem__, name)) for name, t in tensors.items()
        ]
        write_tensors(_tensors_file(folder, part.index), entries)  # the writer of safetensors would copy all of them
    facts = _facts_file(folder, part.index)
    aside = facts.with_suffix(".tmp")
    aside.write_text(part.to_json())
    aside.rename(facts)


def read_part(folder: Path, index: int) -> Part | None:
    """Return the facts of a finished part, or None."""
    file = _facts_file(folder, index)
    return Part.of_json(file.read_text()) if file.is_file() else None


def _facts_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.json"


def _tensors_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.safetensors"


def write_adapter(
    folder: Path, parts: Path, chosen: Sequence[tuple[Part, int]], dtype: str, anatomy: Anatomy, base: Path
) -> None:
    """Write a PEFT adapter from the leading ranks of parts, with one part's factors in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    for part, rank in chosen:
        for place in part.places:
            entries += _factor_entries(parts, part, place, rank, getattr(torch, dtype))
    write_tensors(folder / WEIGHTS, entries)
    ranks = {place.module: rank for part, rank in chosen for place in part.places}
    kinds = {place.module: place.kind for part, _ in chosen for place in part.places}
    (folder / CONFIG).write_text(json.dumps(_peft_config(ranks, kinds, anatomy, base), indent=2) + "\n")


@dataclass(frozen=True)
class Entry:
    """One tensor to write. `load` reads its data when the writer reaches it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_tensors(file: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file with one tensor in memory at a time. Raises OSError if the disk is full."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.load().to(entry.dtype).contiguous()
            assert tensor.shape == entry.shape, (
                f"{entry.name} has shape {tuple(tensor.shape)}, its header says {entry.shape}"
            )
            stream.write(tensor.flatten().view(torch.uint8).numpy())


def _factor_entries(parts: Path, part: Part, place: Place, rank: int, dtype: torch.dtype) -> Iterator[Entry]:
    file, shape = _tensors_file(parts, part.index), part.shape
    num_out, num_in = shape[0], torch.Size(shape[1:]).numel()
    if place.kind is Kind.TRANSPOSED:
        num_out, num_in = num_in, num_out
    name = f"{ADAPTER_PREFIX}{place.module}"

    def load_a() -> Tensor:
        with safe_open(file, framework="pt") as stored:
            return stored.get_slice("a")[:rank]

    def load_b() -> Tensor:
        with safe_open(file, framework="pt") as stored:
            return stored.get_slice("b")[:, :rank]

    if place.kind is Kind.EMBEDDING:  # PEFT's A is (rank, vocabulary), B is (width, rank)
        yield Entry(f"{name}.lora_embedding_A", (rank, num_out), dtype, lambda: load_b().T)
        yield Entry(f"{name}.lora_embedding_B", (num_in, rank), dtype, lambda: load_a().T)
        return
    kernel = shape[2:] if place.kind is Kind.CONVOLUTION else ()
    a_shape = (rank, num_in // torch.Size(kernel).numel(), *kernel)
    b_shape = (num_out, rank, *(1 for _ in kernel))
    yield Entry(f"{name}.lora_A.weight", a_shape, dtype, lambda: load_a().reshape(a_shape))
    yield Entry(f"{name}.lora_B.weight", b_shape, dtype, lambda: load_b().reshape(b_shape))


def _peft_config(ranks: dict[str, int], kinds: dict[str, Kind], anatomy: Anatomy, base: Path) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored, because PEFT matches each key against the end of every module's path.
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    is_causal = anatomy.architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": rank,
        "fan_in_fan_out": Kind.TRANSPOSED in kinds.values(),
        "target_modules": _targets(list(ranks), anatomy),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }


def _targets(modules: list[str], anatomy: Anatomy) -> list[str] | str:
    """Return the module paths, or one pattern of them if PEFT would also match a path that ends in one of them."""
    others = anatomy.modules - set(modules)
    is_ambiguous = any(other.endswith(f".{module}") for module in modules for other in others)
    return "|".join(map(re.escape, modules)) if is_ambiguous else modules


def write_remainder(folder: Path, parts: Sequence[Part]) -> None:
    """Write what factors cannot carry: whole tensors by name, and new vocabulary rows as `NAME.new_rows`."""
    entries = []
    for part in parts:
        with safe_open(_tensors_file(folder.parent, part.index), framework="pt") as stored:
            key = "new_rows" if part.num_new_rows else "value"
            shape, dtype = tuple(stored.get_slice(key).get_shape()), stored.get_tensor(key).dtype
        name = part.path + (NEW_ROWS if part.num_new_rows else "")
        entries.append(Entry(name, shape, dtype, _loader(_tensors_file(folder.parent, part.index), key)))
    if entries:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / REMAINDER, entries)


def _loader(file: Path, key: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(key)

    return load


@torch.no_grad()
def apply_remainder(model: CausalLM, file: Path) -> None:
    """Copy a remainder into a model of the base's class, and grow its vocabulary for new rows.

    Merge the adapter first: its factors have the size of the base's vocabulary.
    """
    with safe_open(file, framework="pt") as stored:
        rows = {name.removesuffix(NEW_ROWS): name for name in stored.keys() if name.endswith(NEW_ROWS)}  # noqa: SIM118
        for name in rows.values():
            num_rows = len(model.get_input_embeddings().weight) + stored.get_slice(name).get_shape()[0]
            model.resize_token_embeddings(num_rows, mean_resizing=False)
            break
        state = model.state_dict()
        for name in stored.keys():  # noqa: SIM118 (not a dict)
            value = stored.get_tensor(name)
            target = state[name.removesuffix(NEW_ROWS)]
            (target[-len(value) :] if name.endswith(NEW_ROWS) else target).copy_(value)
