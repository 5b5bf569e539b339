"""The model and the adapters that all engines of the serving benchmark have: ordinary folders that anyone can load."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_files import Adapter, LoraFactors, save_adapter
from cluster.checkpoints import open_checkpoint

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # what S-LoRA's adapters change
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_STRENGTH = 0.02  # of the random factors of B: enough to change what is generated


@dataclass(frozen=True)
class World:
    """A Hugging Face checkpoint in float32 and PEFT adapters for it."""

    model: Path
    adapters: tuple[Path, ...]

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return int(json.loads((self.model / "config.json").read_text())["vocab_size"])


def make_world(
    folder: Path, model: Path, num_adapters: int, ranks: tuple[int, ...] = (8,), modules: tuple[str, ...] = LINEARS
) -> World:
    """Random adapters of these ranks, in turn; what a former run has made in the folder is taken as it is."""
    base, adapters = folder / model.name, folder / f"rank-{'-'.join(map(str, ranks))}-on-{len(modules)}-modules"
    if not base.exists():
        _write_model(model, base)
    shapes = {p: s for p, s in open_checkpoint(base).linear_shapes().items() if p.rsplit(".", 1)[-1] in modules}
    folders = tuple(adapters / f"{number:05}" for number in range(num_adapters))
    for number, place in enumerate(folders):
        if not place.exists():
            save_adapter(_random_adapter(shapes, ranks[number % len(ranks)], number), place)
    return World(base, folders)


def _write_model(model: Path, place: Path) -> None:
    """A copy in float32, the one format that all engines compute in on a CPU."""
    aside = place.with_name(f".{place.name}")
    shutil.copytree(model, aside, dirs_exist_ok=True)
    for file in aside.glob("*.safetensors"):
        save_file({name: value.float() for name, value in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((aside / "config.json").read_text())
    config.pop("torch_dtype", None)
    (aside / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
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
