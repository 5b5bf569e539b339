"""A fleet of its own for each test, copied from the `world` that a test file makes once."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.config.settings import Fleet
from cluster.registry.registry import Registry
from tests.worlds.fleets import copy_of, registered


@pytest.fixture
def fleet(world: Path, tmp_path: Path) -> Fleet:
    return copy_of(world, tmp_path)


@pytest.fixture
def registry(fleet: Fleet) -> Iterator[Registry]:
    with closing(registered(fleet)) as opened:
        yield opened
