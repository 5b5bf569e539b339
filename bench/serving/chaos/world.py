"""The world of the fault run: a small model, adapters of every kind on a disk that can be damaged, expected answers."""

import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.models import byte_tokenizer, random_llama
from bench.serving.chaos.truth import are_likeliest, greedy_answers
from cluster.adapters.files import Adapter, LoraFactors, save_adapter
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import Checkpoint, open_checkpoint

MAX_RANK = 16
WEIGHTS = "adapter_model.safetensors"
_STRENGTH = 0.7  # an adapter's change relative to the base's weights: enough that no two adapters answer alike
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEARS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_EVERYTHING = (*_LINEARS, "embed_tokens", "lm_head")

Fate = Literal["sound", "poison", "bad"]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter. With `is_pattern` each module has its own rank and alpha."""

    name: str
    rank: int = 8
    modules: tuple[str, ...] = _LINEARS
    is_rslora: bool = False
    is_dora: bool = False
    is_pattern: bool = False


KINDS = (
    Kind("lora-4", 4),
    Kind("lora-8"),
    Kind("lora-16", 16),
    Kind("lora-qv", 8, ("q_proj", "v_proj")),
    Kind("rslora", 8, is_rslora=True),
    Kind("pattern", 12, is_pattern=True),
    Kind("dora", 6, is_dora=True),
    Kind("rsdora-pattern", 5, _ATTENTION, is_rslora=True, is_dora=True, is_pattern=True),
    Kind("embedding", 4, ("embed_tokens", "k_proj", "down_proj")),
    Kind("head", 4, ("lm_head", "o_proj")),
    Kind("dora-everywhere", 5, _EVERYTHING, is_dora=True),
)
POISON = Kind("poison", 3)
FAULTS = ("NaN", "rank", "no B", "unknown module", "shape", "pickle", "no config")


@dataclass(frozen=True)
class Content:
    """One adapter's files, by their content key. "poison" loads and makes logits NaN; "bad" never loads."""

    name: str
    key: str
    fate: Fate


@dataclass(frozen=True)
class World:
    """Everything on the disk, the prompts, and their greedy tokens by adapter key (None: the base alone)."""

    folder: Path
    base: Path
    contents: tuple[Content, ...]
    prompts: tuple[tuple[int, ...], ...]
    expected: Mapping[str | None, Sequence[tuple[int, ...]]]

    def blobs(self) -> BlobStore:
        """Open the store, with its cache beside it."""
        return BlobStore(str(self.folder / "blobs"), self.folder / "cache")

    def by_fate(self, fate: Fate) -> list[Content]:
        """Return the adapters of one fate."""
        return [content for content in self.contents if content.fate == fate]

    def is_tie(self, key: str | None, prompt: int, tokens: Sequence[int]) -> bool:
        """Whether each token, given those before it, is the likeliest one or tied with it."""
        folder = None if key is None else _pristine(self.folder, key)
        return are_likeliest(self.base, folder, self.prompts[prompt], tokens)


def make_world(folder: Path, base: Path | None, num_adapters: int, num_prompts: int, seed: int) -> World:
    """Write the adapters and compute the expected answers. Without a base, make one with random weights."""
    base = base or random_base(folder / "base")
    checkpoint, blobs = open_checkpoint(base), BlobStore(str(folder / "blobs"), folder / "cache")
    contents = []
    for name, fate, made in _write_adapters(folder / "made", checkpoint, num_adapters, seed):
        key = blobs.put_folder(made)
        shutil.move(made, _pristine(folder, key))
        contents.append(Content(name, key, fate))
    shutil.copytree(folder / "blobs", folder / "backup")
    prompts = _prompts(num_prompts, checkpoint.shape("model.embed_tokens.weight")[0], random.Random(seed))
    sound = {content.key: _pristine(folder, content.key) for content in contents if content.fate == "sound"}
    return World(folder, base, tuple(contents), prompts, dict(greedy_answers(base, sound, prompts)))


class Disk:
    """Damages and restores the store's files and the machine's copies of them. Each harm is one atomic change.

    Files are not changed in place: nothing can protect a process that has them mapped.
    """

    HARMS = (
        "delete",
        "truncate",
        "corrupt",
        "delete cache",
        "truncate cache",
        "corrupt cache",
        "flip a bit of cache",
        "delete packed",
        "truncate packed",
        "corrupt packed",
        "flip a bit of packed",
    )

    def __init__(self, world: World):
        self._folder = world.folder

    def hurt(self, key: str, how: str) -> None:
        """Do one of HARMS, and delete copies that would hide it: the packed file, and for the store the cache."""
        cached, tar = self._folder / "cache" / key, self._folder / "blobs" / f"{key}.tar"
        packed = next(self._folder.glob(f"packed/*/{key}*"), tar.with_name("none"))
        file = packed if how.endswith("packed") else cached / WEIGHTS if how.endswith("cache") else tar
        if file != packed:
            packed.unlink(missing_ok=True)
        if file == tar or how == "delete cache":
            _remove(cached)
        if how.startswith("delete"):
            file.unlink(missing_ok=True)
        elif file.exists():
            _replace(file, _damaged(file.read_bytes(), how))

    def mend(self, key: str) -> None:
        """Restore the file in the store, and empty the cache."""
        _replace(self._folder / "blobs" / f"{key}.tar", (self._folder / "backup" / f"{key}.tar").read_bytes())
        _remove(self._folder / "cache" / key)


def random_base(folder: Path) -> Path:
    """Write a Llama of 0.2 M random parameters with a byte-level tokenizer."""
    tokenizer = byte_tokenizer(eos_token="</s>")
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
    }
    random_llama(sizes).save_pretrained(folder)
    return folder


# Adapters.


def _write_adapters(
    folder: Path, checkpoint: Checkpoint, num_adapters: int, seed: int
) -> Iterator[tuple[str, Fate, Path]]:
    for number in range(num_adapters):
        kind = KINDS[number % len(KINDS)]
        save_adapter(_adapter(checkpoint, kind, seed + number), folder / "next")
        yield f"{kind.name}-{number}", "sound", folder / "next"
    for number in range(2):
        poison = _adapter(checkpoint, POISON, seed + 10_000 + number)
        save_adapter(_scaled(poison, 1e18), folder / "next")
        yield f"poison-{number}", "poison", folder / "next"
    for number, fault in enumerate(FAULTS):
        rank = 2 * MAX_RANK if fault == "rank" else 3
        save_adapter(_adapter(checkpoint, Kind("bad", rank), seed + 20_000 + number), folder / "next")
        _spoil(folder / "next", fault)
        yield f"bad: {fault}", "bad", folder / "next"


def _adapter(checkpoint: Checkpoint, kind: Kind, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {m: s for m, s in checkpoint.adaptable_shapes().items() if m.rsplit(".", 1)[-1] in kind.modules}
    factors = {module: _factors(_weight_of(checkpoint, module), module, kind, generator) for module in sorted(shapes)}
    return Adapter(factors, is_rslora=kind.is_rslora)


def _factors(weight_FD: Tensor, module: str, kind: Kind, generator: torch.Generator) -> LoraFactors:
    (num_out, num_in), rank = weight_FD.shape, kind.rank
    if kind.is_pattern:
        rank = int(torch.randint(1, kind.rank + 1, (), generator=generator))
    scaling = (1.0 + rank % 3) / (math.sqrt(rank) if kind.is_rslora else rank)
    spread = _STRENGTH * float(weight_FD.std()) * math.sqrt(num_in / rank) / scaling
    magnitude_F = None
    if kind.is_dora:
        magnitude_F = (0.7 + 0.6 * torch.rand(num_out, generator=generator)) * weight_FD.norm(dim=1)
    return LoraFactors(
        torch.randn(rank, num_in, generator=generator) / math.sqrt(num_in),
        torch.randn(num_out, rank, generator=generator) * spread,
        scaling,
        magnitude_F,
        is_embedding=module.endswith("embed_tokens"),
    )


def _weight_of(checkpoint: Checkpoint, module: str) -> Tensor:
    """Return the weight of an adaptable module: an embedding is transposed, and a tied head is the embedding."""
    name = module if f"{module}.weight" in checkpoint.names() else "model.embed_tokens"
    weight = checkpoint.load(f"{name}.weight").float()
    return weight.T if module.endswith("embed_tokens") else weight


def _scaled(adapter: Adapter, factor: float) -> Adapter:
    factors = {m: replace(f, a_RD=f.a_RD * factor, b_FR=f.b_FR * factor) for m, f in adapter.factors.items()}
    return replace(adapter, factors=factors)


def _spoil(folder: Path, fault: str) -> None:
    file = folder / WEIGHTS
    tensors = load_file(file)
    names = sorted(tensors)
    if fault == "NaN":
        tensors[names[0]][0, 0] = math.nan
    if fault == "no B":
        del tensors[next(name for name in names if "lora_B" in name)]
    if fault == "unknown module":
        tensors = {name.replace("layers.1.", "layers.99."): tensor for name, tensor in tensors.items()}
    if fault == "shape":
        tensors = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(tensors, file)
    if fault == "pickle":
        file.rename(folder / "adapter_model.bin")
    if fault == "no config":
        (folder / "adapter_config.json").unlink()


def _prompts(num_prompts: int, vocab_size: int, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Draw different prompts, most of which begin with one of six common prefixes of one to two pages."""

    def draw(num_tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocab_size) for _ in range(num_tokens))

    prefixes = [(), *(draw(rng.randint(16, 33)) for _ in range(6))]
    different = dict.fromkeys(rng.choice(prefixes) + draw(rng.randint(2, 9)) for _ in islice(count(), 4 * num_prompts))
    return tuple(different)[:num_prompts]


# Files.


def _pristine(folder: Path, key: str) -> Path:
    """Return the folder of an adapter's undamaged files."""
    (folder / "pristine").mkdir(exist_ok=True)
    return folder / "pristine" / key


def _damaged(data: bytes, how: str) -> bytes:
    if how.startswith("truncate"):
        return data[: len(data) // 2]
    if how.startswith("corrupt"):
        return b"\xff" * len(data)
    return data[:-2] + bytes([data[-2] ^ 0x40]) + data[-1:]  # a bit of the last float32's exponent


def _replace(file: Path, data: bytes) -> None:
    part = file.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, file)


def _remove(folder: Path) -> None:
    """Delete a folder in one step. Processes with its files open can still read them."""
    aside = folder.with_name(f".gone-{folder.name}-{os.urandom(4).hex()}")
    try:
        os.rename(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def describe(world: World) -> dict[str, Any]:
    """Return the world's records. `distinct_share` is the share of expected answers that no other adapter gives."""
    answers = [(prompt, tokens[:4]) for row in world.expected.values() for prompt, tokens in enumerate(row)]
    num_same = len(answers) - len(set(answers))
    return {
        "base": world.base.name,
        "adapters": {fate: len(world.by_fate(fate)) for fate in ("sound", "poison", "bad")},
        "prompts": len(world.prompts),
        "distinct_share": round(1 - num_same / len(answers), 4),
        "blob_bytes": sum(file.stat().st_size for file in (world.folder / "blobs").iterdir()),
        "config": json.loads((world.base / "config.json").read_text())["model_type"],
    }
