"""Tests names as the Hugging Face Hub and Ray Serve LLM write them, and the list of models, over HTTP."""

from pathlib import Path
from urllib.parse import quote

import httpx
import openai
import pytest

from cluster.config.settings import ServingConfig
from tests.worlds.servers import Server, serve_bases
from tests.worlds.serving import make_adapter, make_checkpoint

HUB, SHORT = "Qwen/Qwen2.5-0.5B", "short"
ADAPTERS = ["acme/support-bot", f"{HUB}:support-bot", "support-bot", "acme/eu/bot.v1_2"]
ASKED = {"prompt": "Where is my card?", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """Serve a base with a hub id as its name and one with a shorter context, and an adapter under each name."""
    folder = tmp_path_factory.mktemp("names")
    make_checkpoint(folder / HUB)
    make_checkpoint(folder / SHORT, max_position_embeddings=100, seed=1)
    config = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=400)
    with serve_bases(folder, folder, config, (HUB, SHORT)) as server:
        for seed, name in enumerate(ADAPTERS):
            path = make_adapter(folder / "made" / str(seed), folder / HUB, rank=2, seed=seed)
            body = {"lora_name": name, "lora_path": str(path), "base_model_name": HUB}
            loaded = server.post("/v1/load_lora_adapter", **body)
            assert loaded.json() == {"status": "loaded", "model": f"{name}@1", "base": HUB}
        yield server


def test_each_name_answers_with_its_own_weights(server: Server):
    texts = {name: _text(server, name) for name in (HUB, SHORT, *ADAPTERS)}
    assert len(set(texts.values())) == 6
    assert {name: _text(server, f"{name}@1") for name in ADAPTERS} == {name: texts[name] for name in ADAPTERS}


@pytest.mark.parametrize("name", [HUB, *ADAPTERS])
@pytest.mark.parametrize("safe", ["/:@", ""], ids=["plain", "quoted"])
def test_a_model_is_found_by_its_name(server: Server, name: str, safe: str):
    label = name if name == HUB else f"{name}@1"
    for asked in {name, label}:
        found = httpx.get(f"{server.url}/v1/models/{quote(asked, safe=safe)}")
        assert (found.status_code, found.json()["id"]) == (200, name)
    assert server.client.models.retrieve(name).id == name


@pytest.mark.parametrize("name", ["acme", "acme/support-bot/", "acme/support-bot@2", "support-bot/acme", "a b"])
def test_another_name_is_not_found(server: Server, name: str):
    with pytest.raises(openai.NotFoundError, match=f"The model '{name}' does not exist"):
        server.client.models.retrieve(name)


def test_the_list_has_root_parent_and_context_length(server: Server):
    listed = {model.id: model.model_dump() for model in server.client.models.list()}
    assert listed.keys() == {HUB, SHORT, *ADAPTERS}
    base, short, adapter = listed[HUB], listed[SHORT], listed["acme/support-bot"]
    assert (base["root"], base["parent"], base["max_model_len"]) == (str(server.files / HUB), None, 400)
    assert short["max_model_len"] == 100
    assert (adapter["parent"], adapter["max_model_len"]) == (HUB, 400)
    assert adapter["root"] == server.registry.find("acme/support-bot", 1).blob_key


def test_metrics_and_headers_name_the_base_as_it_is(server: Server):
    answer = server.post("/v1/completions", model="acme/support-bot", **ASKED)
    assert (answer.headers["x-relora-version"], answer.headers["x-relora-base"]) == ("acme/support-bot@1", HUB)
    assert answer.json()["model"] == "acme/support-bot@1"
    metrics = httpx.get(f"{server.url}/metrics").text
    assert f'relora_requests_total{{base="{HUB}",route="/v1/completions",status="200"}}' in metrics
    httpx.get(f"{server.url}/v1/models/acme/support-bot")
    assert 'route="/v1/models/{name:path}"' in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a b", "it contains ' '"),
        ("acme/", "one of its parts is empty"),
        ("acme/../etc", "its part '..' starts with '.'"),
        ("acme/bot@1", "'@' is reserved for versions"),
    ],
)
def test_a_bad_name_is_refused_with_the_fault(server: Server, name: str, fault: str):
    path = str(server.files / "made" / "0")
    loaded = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, base_model_name=HUB)
    assert loaded.status_code == 400
    assert fault in loaded.json()["error"]["message"]


def test_an_adapter_cannot_take_a_base_name(server: Server):
    path = str(server.files / "made" / "0")
    loaded = server.post("/v1/load_lora_adapter", lora_name=HUB, lora_path=path, base_model_name=HUB)
    assert (loaded.status_code, loaded.json()["error"]["code"]) == (409, "conflict")


def test_an_adapter_with_a_slash_is_unloaded(server: Server, tmp_path: Path):
    path = make_adapter(tmp_path / "made", server.files / HUB, rank=2, seed=9)
    body = {"lora_name": "acme/gone", "lora_path": str(path), "base_model_name": HUB}
    assert server.post("/v1/load_lora_adapter", **body).status_code == 200
    assert server.post("/v1/unload_lora_adapter", lora_name="acme/gone").json()["model"] == "acme/gone@1"
    assert server.post("/v1/completions", model="acme/gone", **ASKED).status_code == 404


def _text(server: Server, model: str) -> str:
    return server.client.completions.create(model=model, **ASKED).choices[0].text
