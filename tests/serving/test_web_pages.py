"""Tests the pages for people, and the routes for those who run the service."""

import re
import threading
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from cluster.config.settings import ServingConfig
from cluster.registry.registry import Status
from tests.worlds.servers import Server, serve_bases, wait_until
from tests.worlds.serving import make_adapter, make_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """Serve a base with an adapter that has a canary. A second base is registered without an engine."""
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "v1")
    adapter = make_adapter(folder / "adapter", folder / "v1", rank=2)
    config = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=400)
    with serve_bases(folder, folder, config, ("v1",)) as server:
        assert server.post("/v1/load_lora_adapter", lora_name="acme/bot", lora_path=str(adapter)).status_code == 200
        key = server.registry.find("acme/bot", 1).blob_key
        server.registry.add_base("idle", "/models/<b>idle</b>", "print")
        server.registry.add_version("acme/bot", "v1", Status.CANARY, blob_key=key, content_hash=key)
        wait_until(lambda: "acme/bot@2" in httpx.get(server.url).text)
        yield server


class Links(HTMLParser):
    """Collects what a page links to and what it loads."""

    def __init__(self, page: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "a":
            self.links.append(found["href"] or "")
        elif tag in ("script", "link", "img", "iframe"):
            self.loaded.append(tag)


def test_the_first_page_shows_what_is_served(server: Server):
    answer = httpx.get(server.url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    text = re.sub(r"<[^>]*>|\s+", " ", answer.text)
    for shown in ("v1 running", "idle not running", "acme/bot acme/bot@1 v1 acme/bot@2 on v1"):
        assert shown in re.sub(r" +", " ", text)
    assert "/models/&lt;b&gt;idle&lt;/b&gt;" in answer.text


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_and_their_links_lead_somewhere(server: Server, path: str):
    page = httpx.get(f"{server.url}{path}").text
    links = Links(page)
    assert links.loaded == []
    assert "url(" not in page
    for link in links.links:
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in page
        else:
            assert httpx.get(httpx.URL(f"{server.url}{path}").join(link), timeout=30).status_code == 200


def test_the_api_page_shows_every_route_and_field(server: Server):
    page = httpx.get(f"{server.url}/docs").text
    document = httpx.get(f"{server.url}/openapi.json").json()
    operations = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    assert "POST /v1/chat/completions" in operations
    for operation in operations:
        assert f">{operation}</code>" in page
    for name, schema in document["components"]["schemas"].items():
        if name in ("ChatBody", "CompletionBody", "LoadAdapterBody"):
            for field in schema["properties"]:
                assert f"<code>{field}</code>" in page
    row = re.search(r"<tr><td><code>top_p</code>.*?</tr>", page).group()
    assert re.findall(r"<td>(.*?)</td>", row)[1:3] == ["number (above 0 to 1)", "<code>1.0</code>"]
    row = re.search(r"<tr><td><code>lora_name</code>.*?</tr>", page).group()
    assert re.findall(r"<td>(.*?)</td>", row)[1:3] == ["string", "<code>required</code>"]


def test_redoc_is_gone_and_unknown_paths_are_not_found(server: Server):
    for path in ("/redoc", "/v2", "/docs/x"):
        answer = httpx.get(f"{server.url}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_version_and_ping(server: Server):
    assert httpx.get(f"{server.url}/version").json() == {"version": version("relora")}
    for method in ("GET", "POST"):
        assert httpx.request(method, f"{server.url}/ping").status_code == 200


def test_load_counts_the_sequences_of_all_engines(server: Server):
    def load() -> int:
        return httpx.get(f"{server.url}/load").json()["server_load"]

    def ask() -> None:
        while not has_seen.is_set():
            server.post("/v1/completions", model="v1", prompt="a", max_tokens=390, n=3, ignore_eos=True)

    assert load() == 0
    has_seen = threading.Event()
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_until(lambda: load() == 3)
    finally:
        has_seen.set()
        asking.join()
    wait_until(lambda: load() == 0)


def test_ping_fails_with_the_engine(tmp_path: Path):
    make_checkpoint(tmp_path / "v1")
    with serve_bases(tmp_path, tmp_path, ServingConfig(memory_bytes=8 * 2**20), ("v1",)) as server:
        assert httpx.get(f"{server.url}/ping").status_code == 200
        server.loops["v1"].stop()
        assert httpx.get(f"{server.url}/ping").status_code == 503
        assert httpx.get(f"{server.url}/load").json() == {"server_load": 0}
