"""A tiny fleet for campaigns: trained specialists on a small random base, and a second base on which copies fail."""

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.adapters.files import save_adapter
from cluster.config.fleet_file import load_fleet
from cluster.config.readapt import TrainConfig
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs, open_registry, register_adapters
from cluster.registry.registry import Registry
from readapt.ladder.runs import train_scratch
from readapt.training.data import Row, encoder_for, load_task
from readapt.training.evaluate import Evaluator
from readapt.training.lora import blank, linear_shapes, load_base
from tests.worlds.readapt import ready_when
from tests.worlds.serving import make_checkpoint

LETTERS = "abc"
TRAIN = {"full_steps": 40, "short_steps": 10, "scratch_steps": 60, "eval_every": 10, "max_tokens": 32}


def make_fleet(folder: Path, names: tuple[str, ...] = ("calm", "busy", "usual")) -> Fleet:
    """Make two bases and one specialist of v1 per name, all in fleet.toml; "busy" has more traffic than "usual"."""
    torch.manual_seed(0)
    v1 = make_checkpoint(folder / "v1")
    evolve(v1, make_checkpoint(folder / "v2"))
    model, encoder = load_base(v1), encoder_for(v1, max_tokens=TRAIN["max_tokens"])
    lines = ['name = "tiny"', _base("v1"), _base("v2")]
    for index, name in enumerate(names):
        _write_task(folder / name / "data", labels=[f"{name[0]}{letter.upper()}" for letter in LETTERS], seed=index)
        _train(model, encoder, folder / name, rank=4 + index)
        lines.append(_adapter(name, traffic={"busy": 9.0, "usual": 3.0}.get(name, 1.0)))
    settings = {"search": {"trials": 5, "subset_rows": 12}, "train": TRAIN, "gate": {"tolerance_points": 5.0}}
    for section, values in settings.items():
        lines += [f"[readapt.{section}]", *(f"{key} = {value}" for key, value in values.items())]
    (folder / "fleet.toml").write_text("\n".join(lines))
    return load_fleet(folder / "fleet.toml")


def copy_of(world: Path, folder: Path) -> Fleet:
    """Copy a folder of `make_fleet`, so that a test has its own fleet."""
    shutil.copytree(world, folder / "fleet")
    return load_fleet(folder / "fleet" / "fleet.toml")


def registered(fleet: Fleet) -> Registry:
    """Return the fleet's registry, with its adapters live on v1."""
    registry = open_registry(fleet)
    register_adapters(fleet, registry, open_blobs(fleet))
    return registry


def evolve(old: Path, new: Path, strength: float = 0.6) -> None:
    """Write to `new` the old base plus a strong change of rank 3 in every linear module of its layers."""
    weights = load_file(old / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            left, right = (torch.randn(size, 3, generator=generator) for size in weight.shape)
            change = left @ right.T
            weights[name] = weight + change * (strength * weight.norm() / change.norm())
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})


def _write_task(folder: Path, labels: list[str], seed: int) -> None:
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for split, num_rows in {"train": 96, "valid": 36, "test": 9}.items():
        rows = []
        for index in range(num_rows):
            letter = index % len(LETTERS)
            prompt = f"{rng.randrange(100, 999)} {LETTERS[letter]}:"
            rows.append(json.dumps({"prompt": prompt, "completion": labels[letter]}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))


def _train(model: torch.nn.Module, encoder, folder: Path, rank: int) -> None:
    task = load_task(folder / "data")
    like = blank(linear_shapes(model), rank, alpha=2.0 * rank)
    config = TrainConfig(scratch_steps=150, eval_every=25, scratch_learning_rate=1e-2)
    evaluate = Evaluator(model, encoder, task.valid, "exact_match")
    rows: list[Row] = task.train
    done = train_scratch(
        model, encoder, rows, like, config, evaluate=evaluate, watch=ready_when(lambda e: e.quality >= 97)
    )
    assert done.best_quality >= 90, f"the specialist in {folder} did not learn its task: {done.best_quality}"
    save_adapter(done.best, folder / "adapter")


def _base(name: str) -> str:
    return f'[[bases]]\nname = "{name}"\npath = "{name}"'


def _adapter(name: str, traffic: float) -> str:
    return (
        f'[[adapters]]\nname = "{name}"\npath = "{name}/adapter"\nbase = "v1"\ndata = "{name}/data"\n'
        f"traffic = {traffic}"
    )
