"""Reads and writes the directions and magnitudes of an adapter."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.adapters.files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError
from readapt.continual.directions import Decoupled

_WEIGHTS = "directions.safetensors"
_MAGNITUDES = "directions.json"
_STATISTICS = ("inputs", "classes")


def save_directions(state: Decoupled, folder: Path) -> None:
    """Write directions.safetensors and directions.json into an existing folder."""
    tensors = {
        f"{n}.{module}.{side}": tensor.detach().contiguous().clone()
        for n, direction in enumerate(state.directions)
        for module, factors in direction.factors.items()
        for side, tensor in (("A", factors.a_RD), ("B", factors.b_FR))
    }
    for kind in _STATISTICS:
        tensors |= {f"{kind}.{name}": t.contiguous().clone() for name, t in getattr(state, kind).items()}
    save_file(tensors, folder / _WEIGHTS)
    numbers = {"magnitudes": state.magnitudes, "has_readout": state.has_readout}
    (folder / _MAGNITUDES).write_text(json.dumps(numbers, indent=2) + "\n")


def load_directions(folder: Path) -> Decoupled:
    """Read what `save_directions` wrote. Raises InvalidAdapterError if it is incomplete."""
    try:
        numbers = json.loads((folder / _MAGNITUDES).read_text())
        magnitudes, has_readout = numbers["magnitudes"], bool(numbers["has_readout"])
        tensors = load_file(folder / _WEIGHTS)
        directions = tuple(Adapter(_factors_of(tensors, n)) for n in range(len(magnitudes)))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidAdapterError(f"{folder}: the saved directions cannot be read: {error!r}") from error
    statistics = {
        kind: {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}
        for kind in _STATISTICS
    }
    return Decoupled(directions, tuple(float(value) for value in magnitudes), **statistics, has_readout=has_readout)


def _factors_of(tensors: dict[str, Tensor], n: int) -> dict[str, LoraFactors]:
    start = f"{n}."
    modules = [name[len(start) : -2] for name in tensors if name.startswith(start) and name.endswith(".A")]
    if not modules:
        raise ValueError(f"direction {n} is missing")
    return {m: LoraFactors(tensors[f"{start}{m}.A"], tensors[f"{start}{m}.B"], 1.0) for m in modules}
