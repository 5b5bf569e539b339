"""A model of two linears, with adapters and directions for it."""

import torch
from torch import nn

from cluster.adapters.files import Adapter
from readapt.continual.directions import Decoupled, decouple
from tests.worlds.readapt import random_factors

SHAPES = {"one": (7, 5), "two": (6, 7)}


def an_adapter(seed: int, rank: int = 3, scaling: float = 0.7, modules: tuple[str, ...] = ("one", "two")) -> Adapter:
    sizes = [(name, *SHAPES[name]) for name in modules]
    return Adapter({n: random_factors(out, width, rank, scaling, seed + i) for i, (n, out, width) in enumerate(sizes)})


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: factors.delta().double() for name, factors in adapter.factors.items()}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 6)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def a_state() -> Decoupled:
    """Return three directions of different ranks. One of them lacks a module."""
    adapters = [an_adapter(1, rank=2), an_adapter(5, rank=1, modules=("two",)), an_adapter(9, rank=3)]
    parts = [decouple(adapter) for adapter in adapters]
    return Decoupled(tuple(p.directions[0] for p in parts), (1.5, -0.5, 0.25))
