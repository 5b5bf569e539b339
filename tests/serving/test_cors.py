"""Tests what a browser needs before a page of another origin may call the server."""

from pathlib import Path

import httpx
import pytest

from cluster.config.settings import ServingConfig
from tests.worlds.servers import serve_bases
from tests.worlds.serving import make_checkpoint

PAGE = "http://localhost:3000"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}
BODY = {"model": "v1", "prompt": "a", "max_tokens": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "v1")
    return folder


def answers(files: Path, folder: Path, origins: tuple[str, ...], origin: str = PAGE) -> list[httpx.Response]:
    """Return the answers to a preflight, a completion, a stream and a bad request from a page of `origin`."""
    config = ServingConfig(memory_bytes=8 * 2**20, cors_origins=origins)
    with serve_bases(files, folder, config, ("v1",)) as server:
        url = f"{server.url}/v1/completions"
        bodies = [BODY, {**BODY, "stream": True}, {**BODY, "model": "nobody"}]
        posted = [httpx.post(url, json=body, headers={"Origin": origin}, timeout=30) for body in bodies]
        return [httpx.options(url, headers={**PREFLIGHT, "Origin": origin}), *posted]


@pytest.mark.parametrize("origins", [("*",), (PAGE,), ("https://else.where", PAGE)])
def test_a_page_of_an_allowed_origin_can_ask(files: Path, tmp_path: Path, origins: tuple[str, ...]):
    found = answers(files, tmp_path, origins)
    assert [answer.status_code for answer in found] == [200, 200, 200, 404]
    allowed = {answer.headers["access-control-allow-origin"] for answer in found}
    assert allowed == {"*" if origins == ("*",) else PAGE}
    assert "POST" in found[0].headers["access-control-allow-methods"]
    for header in ("authorization", "content-type", "x-stainless-lang"):
        assert header in found[0].headers["access-control-allow-headers"].lower()
    assert "x-relora-version" in found[1].headers["access-control-expose-headers"]


def test_a_page_of_another_origin_is_not_allowed(files: Path, tmp_path: Path):
    found = answers(files, tmp_path, (PAGE,), origin="http://evil.test")
    assert found[0].status_code == 400
    assert not any("access-control-allow-origin" in answer.headers for answer in found)


def test_without_the_setting_no_origin_is_allowed(files: Path, tmp_path: Path):
    found = answers(files, tmp_path, ())
    assert found[0].status_code == 405
    assert not any("access-control-allow-origin" in answer.headers for answer in found)
