"""Points of the search: the shares of the old adapter (alpha) and of the base's evolution (beta), by module.

The paper's method has one pair for the whole adapter. A finer point has separate pairs for groups of modules: by kind
(attention, mlp), by depth (early, middle, late third of the layers), by both, or for single modules by their path.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config.readapt import SearchConfig

Grouping = Literal["all", "kind", "depth", "kind+depth"]
THIRDS = ("early", "middle", "late")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_POSITION = {"kind+depth": 1, "kind": 2, "depth": 3}  # of each grouping in what `module_groups` returns


@dataclass(frozen=True)
class Point:
    """A pair for all modules, and (group, alpha, beta) for groups that differ. The most specific group wins."""

    alpha: float
    beta: float
    overrides: tuple[tuple[str, float, float], ...] = ()

    def of(self, groups: Sequence[str]) -> tuple[float, float]:
        """Return the (alpha, beta) of a module in these groups, the most specific first (see `module_groups`)."""
        pairs = {group: (alpha, beta) for group, alpha, beta in self.overrides}
        return next((pairs[group] for group in groups if group in pairs), (self.alpha, self.beta))


COPY, UNDO, BARE = Point(1.0, 0.0), Point(1.0, -1.0), Point(0.0, 0.0)
CORNERS = (COPY, UNDO, BARE)


def module_groups(modules: Iterable[str]) -> dict[str, tuple[str, str, str, str]]:
    """Return each module's path and groups, the most specific first: (path, "mlp.early", "mlp", "early").

    Thirds are thirds of the layers among `modules`. A module outside the layers has the kind "vocabulary": embeddings
    are early, the head is late.
    """
    modules = list(modules)
    num_layers = 1 + max((_layer(module, 0) for module in modules), default=0)
    return {module: _groups_of(module, num_layers) for module in modules}


def _groups_of(module: str, num_layers: int) -> tuple[str, str, str, str]:
    depth = THIRDS[3 * _layer(module, num_layers) // num_layers]
    kind = _kind(module)
    return module, f"{kind}.{depth}", kind, depth


def _layer(module: str, num_layers: int) -> int:
    found = _LAYER.search(module)
    if found:
        return int(found[1])
    return num_layers - 1 if "lm_head" in module and num_layers else 0


def _kind(module: str) -> str:
    if not _LAYER.search(module):
        return "vocabulary"
    return "mlp" if ".mlp." in module else "attention"


def groups(modules: Iterable[str], grouping: Grouping) -> tuple[str, ...]:
    """Return the groups that exist among these modules, sorted by name; none for "all"."""
    if grouping == "all":
        return ()
    return tuple(sorted({names[_POSITION[grouping]] for names in module_groups(modules).values()}))


@dataclass(frozen=True)
class Space:
    """The box that is searched: one alpha and one beta, or one pair for each of `groups`.

    Its coordinates are named `alpha` and `beta`, or `alpha.mlp`, `beta.mlp` and so on.
    """

    config: SearchConfig
    groups: tuple[str, ...] = ()

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Return (low, high) by coordinate."""
        box = {"alpha": (0.0, self.config.alpha_max), "beta": (self.config.beta_min, self.config.beta_max)}
        return {name + suffix: bound for suffix in self._suffixes() for name, bound in box.items()}

    def coordinates(self, point: Point) -> dict[str, float]:
        """Return a point as a value for each coordinate. It has no groups more specific than those of the space."""
        pairs = [point.of([group]) for group in self.groups] or [(point.alpha, point.beta)]
        coordinates: dict[str, float] = {}
        for suffix, (alpha, beta) in zip(self._suffixes(), pairs, strict=True):
            coordinates |= {"alpha" + suffix: alpha, "beta" + suffix: beta}
        return coordinates

    def point(self, coordinates: Mapping[str, float]) -> Point:
        """Return the point at these coordinates."""
        pairs = [(coordinates["alpha" + suffix], coordinates["beta" + suffix]) for suffix in self._suffixes()]
        return point_of(self.groups, pairs)

    def _suffixes(self) -> list[str]:
        return [f".{group}" for group in self.groups] or [""]


def point_of(names: Sequence[str], pairs: Sequence[tuple[float, float]]) -> Point:
    """Return the point with these pairs for these groups, and their mean as its global pair.

    If all pairs are equal, or there is only one without a group, it has no overrides.
    """
    alpha, beta = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    if len(set(pairs)) == 1:
        return Point(*pairs[0])
    return Point(alpha, beta, tuple((name, *pair) for name, pair in zip(names, pairs, strict=True)))
