"""The model and the adapters that all engines of the serving benchmark load: ordinary folders."""

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
from cluster.adapters.files import Adapter, LoraFactors, save_adapter
from cluster.storage.checkpoints import open_checkpoint

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # the modules of S-LoRA's adapters
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_STRENGTH = 0.02  # spread of the random LoRA B: enough to change the output


@dataclass(frozen=True)
class ServedModel:
    """A Hugging Face checkpoint, PEFT adapters for it (several may share a folder), and the engines' device."""

    model: Path
    adapters: tuple[Path, ...]
    device: str = "cpu"

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        return int(self._config["vocab_size"])

    @property
    def dtype(self) -> str:
        """The dtype of the checkpoint, in which all engines compute."""
        return str(self._config["dtype"])

    @property
    def adapter_bytes(self) -> int:
        """The size of the first adapter's matrices in the model's dtype; its file holds them in float32."""
        size = (self.adapters[0] / "adapter_model.safetensors").stat().st_size
        return size * getattr(torch, self.dtype).itemsize // torch.float32.itemsize

    @property
    def _config(self) -> dict[str, Any]:
        return dict(json.loads((self.model / "config.json").read_text()))


def make_adapters(
    base: Path,
    num_adapters: int,
    ranks: tuple[int, ...] = (8,),
    modules: tuple[str, ...] = LINEARS,
    num_files: int | None = None,
    device: str = "cpu",
) -> ServedModel:
    """Make random adapters beside a base, with these ranks in turn. Adapters of an earlier run are reused.

    Adapters beyond `num_files` share the folders of the first ones.
    """
    place = base.parent / f"{base.name}-rank-{'-'.join(map(str, ranks))}-on-{len(modules)}-modules"
    shapes = {p: s for p, s in open_checkpoint(base).linear_shapes().items() if p.rsplit(".", 1)[-1] in modules}
    folders = [place / f"{number:05}" for number in range(min(num_adapters, num_files or num_adapters))]
    for number, folder in enumerate(folders):
        if not folder.exists():
            save_adapter(_random_adapter(shapes, ranks[number % len(ranks)], number), folder)
    return ServedModel(base, tuple(folders[number % len(folders)] for number in range(num_adapters)), device)


def copy_model(model: Path, place: Path, dtype: str) -> None:
    """Copy a checkpoint in one dtype, so that all engines load the same values."""
    aside = place.with_name(f".{place.name}")
    shutil.copytree(model, aside, dirs_exist_ok=True)
    for file in aside.glob("*.safetensors"):
        save_file({n: value.to(getattr(torch, dtype)) for n, value in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((aside / "config.json").read_text())
    config.pop("torch_dtype", None)
    (aside / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    aside.rename(place)


def write_random_model(sizes: Mapping[str, Any], place: Path, dtype: str, device: str) -> None:
    """Write a Llama of these LlamaConfig sizes with random weights, made on `device`, and a tokenizer."""
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
