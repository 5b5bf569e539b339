"""The model and the adapters that all engines of the serving benchmark have: ordinary folders that anyone can load."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bench.models import random_llama
from cluster.adapter_files import Adapter, LoraFactors, save_adapter
from cluster.checkpoints import open_checkpoint

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # what S-LoRA's adapters change
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_STRENGTH = 0.02  # of the random factors of B: enough to change what is generated


@dataclass(frozen=True)
class World:
    """A Hugging Face checkpoint, PEFT adapters for it (several may have one folder), and where engines compute."""

    model: Path
    adapters: tuple[Path, ...]
    device: str = "cpu"

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return int(self._config["vocab_size"])

    @property
    def dtype(self) -> str:
        """The type that the checkpoint is in, and all engines compute in."""
        return str(self._config["dtype"])

    @property
    def adapter_bytes(self) -> int:
        """What the first adapter's matrices take in the model's type; its file has them in float32."""
        size = (self.adapters[0] / "adapter_model.safetensors").stat().st_size
        return size * getattr(torch, self.dtype).itemsize // torch.float32.itemsize

    @property
    def _config(self) -> dict[str, Any]:
        return dict(json.loads((self.model / "config.json").read_text()))


def make_world(
    base: Path,
    num_adapters: int,
    ranks: tuple[int, ...] = (8,),
    modules: tuple[str, ...] = LINEARS,
    num_files: int | None = None,
    device: str = "cpu",
) -> World:
    """Random adapters of these ranks, in turn, beside a base; what a former run has made there is taken as it is.

    Adapters beyond `num_files` have the folders of the first ones, again in turn.
    """
    place = base.parent / f"{base.name}-rank-{'-'.join(map(str, ranks))}-on-{len(modules)}-modules"
    shapes = {p: s for p, s in open_checkpoint(base).linear_shapes().items() if p.rsplit(".", 1)[-1] in modules}
    folders = [place / f"{number:05}" for number in range(min(num_adapters, num_files or num_adapters))]
    for number, folder in enumerate(folders):
        if not folder.exists():
            save_adapter(_random_adapter(shapes, ranks[number % len(ranks)], number), folder)
    return World(base, tuple(folders[number % len(folders)] for number in range(num_adapters)), device)


def copy_model(model: Path, place: Path, dtype: str) -> None:
    """A checkpoint's copy in one type, so that no engine has another than the others."""
    aside = place.with_name(f".{place.name}")
    shutil.copytree(model, aside, dirs_exist_ok=True)
    for file in aside.glob("*.safetensors"):
        save_file({n: value.to(getattr(torch, dtype)) for n, value in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((aside / "config.json").read_text())
    config.pop("torch_dtype", None)
    (aside / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    aside.rename(place)


def write_random_model(sizes: Mapping[str, Any], place: Path, dtype: str, device: str) -> None:
    """A Llama of these sizes (a LlamaConfig's) with random weights, made on `device`, and a tokenizer of its words."""
    aside = place.with_name(f".{place.name}")
    model = random_llama(sizes, dtype, device)
    model.save_pretrained(aside)
    words = {f"w{number}": number for number in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(aside)
    aside.rename(place)


def _random_adapter(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            path: LoraFactors(
                torch.randn(rank, num_in, generator=draw) * num_in**-0.5,
                torch.randn(num_out, rank, generator=draw) * _STRENGTH,
                2.0,
            )
            for path, (num_out, num_in) in shapes.items()
        }
    )
