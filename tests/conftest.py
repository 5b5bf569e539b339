"""Settings that every test shares."""

import os

# Before torch or ray is imported: one thread per process, no token auth that Ray would switch on by itself, no hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kit DIR`: a folder of real models and tasks; tests that use it skip without."""
    parser.addoption("--kit", default=None, help="folder with models/, tasks/ and traces/ of real ones")


@pytest.fixture(scope="session")
def kit(request: pytest.FixtureRequest):
    """The folder given with --kit, or a skip that says how to give it."""
    from pathlib import Path

    folder = request.config.getoption("--kit")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("needs --kit DIR, a folder with models/, tasks/ and traces/")
    return Path(folder)
