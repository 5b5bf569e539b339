"""Decoupled states on disk."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.adapter_files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError
from readapt.continual.directions import Decoupled

_WEIGHTS = "directions.safetensors"
_MAGNITUDES = "directions.json"
_KEPT = ("inputs", "classes")


def save_directions(state: Decoupled, folder: Path) -> None:
    """Writes a state into an existing folder, beside whatever is there: directions.safetensors and directions.json."""
    tensors = {
        f"{n}.{module}.{side}": tensor.detach().contiguous().clone()
        for n, direction in enumerate(state.directions)
        for module, factors in direction.factors.items()
        for side, tensor in (("A", factors.a_RD), ("B", factors.b_FR))
    }
    for kept in _KEPT:
        tensors |= {f"{kept}.{name}": t.contiguous().clone() for name, t in getattr(state, kept).items()}
    save_file(tensors, folder / _WEIGHTS)
    numbers = {"magnitudes": state.magnitudes, "has_readout": state.has_readout}
    (folder / _MAGNITUDES).write_text(json.dumps(numbers, indent=2) + "\n")


def load_directions(folder: Path) -> Decoupled:
    """Reads what `save_directions` wrote; InvalidAdapterError where it is not whole."""
    try:
        numbers = json.loads((folder / _MAGNITUDES).read_text())
        magnitudes, has_readout = numbers["magnitudes"], bool(numbers["has_readout"])
        tensors = load_file(folder / _WEIGHTS)
        directions = tuple(Adapter(_factors_of(tensors, n)) for n in range(len(magnitudes)))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidAdapterError(f"{folder}: the saved directions cannot be read: {error!r}") from error
    kept = {
        kind: {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}
        for kind in _KEPT
    }
    return Decoupled(directions, tuple(float(value) for value in magnitudes), **kept, has_readout=has_readout)


def _factors_of(tensors: dict[str, Tensor], n: int) -> dict[str, LoraFactors]:
    start = f"{n}."
    modules = [name[len(start) : -2] for name in tensors if name.startswith(start) and name.endswith(".A")]
    if not modules:
        raise ValueError(f"direction {n} is missing")
    return {m: LoraFactors(tensors[f"{start}{m}.A"], tensors[f"{start}{m}.B"], 1.0) for m in modules}
