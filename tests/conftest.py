"""Settings that every test shares."""

import os

# Before torch or ray is imported: one thread per process, no token auth that Ray would switch on by itself, no hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for what is not part of the project; tests that need it skip without."""
    parser.addoption("--kit", default=None, help="folder with models/, tasks/ and traces/ of real ones")
    parser.addoption("--vllm", default=None, help="a Python interpreter that has vLLM")


@pytest.fixture(scope="session")
def kit(request: pytest.FixtureRequest):
    """The folder given with --kit, or a skip that says how to give it."""
    from pathlib import Path

    folder = request.config.getoption("--kit")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("needs --kit DIR, a folder with models/, tasks/ and traces/")
    return Path(folder)


@pytest.fixture(scope="session")
def vllm(request: pytest.FixtureRequest) -> str:
    """The interpreter given with --vllm, or a skip that says how to give it."""
    python = request.config.getoption("--vllm")
    if python is None:
        pytest.skip("needs --vllm PYTHON, an interpreter with vLLM (docs/how-to/bring-your-own-engine.md)")
    return python
