"""What counts in an adapter's folder: through the command line, over HTTP and in the blob store."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.adapters.files import load_adapter
from cluster.adapters.folder import identity, store_adapter
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import MIB, ServingConfig
from cluster.errors import InvalidAdapterError
from cluster.fleet import open_blobs, open_registry, register_base
from cluster.registry.registry import Status
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint
from relora import main
from tests.worlds.servers import Server, serve_bases
from tests.worlds.serving import make_adapter, make_checkpoint

LEFTOVERS = {
    "README.md": b"# my adapter\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    ".DS_Store": b"\0x",
    "optimizer.pt": bytes(2_000_000),
    "training_args.bin": b"\x80pickle",
    "checkpoint-500/optimizer.pt": bytes(1_000_000),
    "runs/events.out": b"log",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    make_checkpoint(folder / "v1")
    make_adapter(folder / "adapter", folder / "v1", rank=3)
    return folder


@pytest.fixture
def snapshot(files: Path, tmp_path: Path) -> Path:
    """The adapter as the hub's cache has it: a folder of links to blobs."""
    blobs, folder = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/0123abc"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted((files / "adapter").iterdir())):
        shutil.copy(file, blobs / str(number))
        (folder / file.name).symlink_to(os.path.relpath(blobs / str(number), folder))
    return folder


def add_leftovers(folder: Path) -> None:
    for name, content in LEFTOVERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def touch_weights(folder: Path) -> None:
    """Change one bit of the weights."""
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.unlink()
    file.write_bytes(content)


def edit_config(folder: Path) -> None:
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | {"lora_alpha": 17}
    file.unlink()
    file.write_text(json.dumps(content))


def add_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def test_leftovers_and_links_do_not_count(files: Path, snapshot: Path):
    before = identity(files / "adapter")
    assert identity(snapshot) == before
    add_leftovers(snapshot)
    assert identity(snapshot) == before


@pytest.mark.parametrize("change", [touch_weights, edit_config, add_template], ids=lambda change: change.__name__)
def test_weights_configuration_and_template_count(snapshot: Path, change: Callable[[Path], None]):
    before = identity(snapshot)
    change(snapshot)
    assert identity(snapshot) != before


def test_only_what_counts_is_stored(snapshot: Path, tmp_path: Path):
    add_leftovers(snapshot)
    store = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    fetched = store.fetch_folder(store_adapter(store, snapshot))
    assert sorted(file.name for file in fetched.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not any(file.is_symlink() for file in fetched.iterdir())
    assert load_adapter(fetched).max_rank == 3


def write_fleet(folder: Path, files: Path, adapter: Path) -> Path:
    (folder / "data").mkdir()
    rows = "".join(json.dumps({"prompt": f"{i}?", "completion": "me"}) + "\n" for i in range(8))
    for split in ("train", "valid", "test"):
        (folder / f"data/{split}.jsonl").write_text(rows)
    (folder / "fleet.toml").write_text(
        f'name = "f"\n[[bases]]\nname = "v1"\npath = "{files / "v1"}"\n'
        f'[[adapters]]\nname = "bot"\npath = "{adapter}"\nbase = "v1"\ndata = "data"\n'
    )
    return folder / "fleet.toml"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, str]]:
    """Run `relora register`; return its exit code and what it printed."""

    def run(fleet: Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["relora", "register", str(fleet)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def test_register_accepts_an_edited_readme_and_refuses_edited_weights(
    files: Path, snapshot: Path, tmp_path: Path, register: Callable[[Path], tuple[int, str]]
):
    fleet = write_fleet(tmp_path, files, snapshot)
    (snapshot / "README.md").write_text("# my adapter")
    assert register(fleet) == (0, "bot@1 is live on v1\n")
    add_leftovers(snapshot)
    assert register(fleet) == (0, "bot@1 is already live on v1\n")
    touch_weights(snapshot)
    code, printed = register(fleet)
    assert code == 1
    assert "not those that bot@1 is registered with" in printed


def test_a_registry_of_an_older_release_keeps_its_blobs(
    files: Path, snapshot: Path, tmp_path: Path, register: Callable[[Path], tuple[int, str]]
):
    """An older release stored all files and registered the hash of all."""
    fleet = load_fleet(write_fleet(tmp_path, files, snapshot))
    add_leftovers(snapshot)
    registry, blobs = open_registry(fleet), open_blobs(fleet)
    key = blobs.put_folder(snapshot)
    assert key != identity(snapshot)
    register_base(fleet, registry, "v1")
    registry.add_adapter("bot", data=str(fleet.adapters[0].data))
    registry.add_version("bot", "v1", Status.LIVE, blob_key=key, content_hash=key)
    registry.close()
    assert register(tmp_path / "fleet.toml") == (0, "bot@1 is already live on v1\n")
    (snapshot / "README.md").write_text("# edited since")
    assert register(tmp_path / "fleet.toml") == (0, "bot@1 is already live on v1\n")
    assert load_adapter(blobs.fetch_folder(key)).max_rank == 3
    edit_config(snapshot)
    assert register(tmp_path / "fleet.toml")[0] == 1


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = ServingConfig(memory_bytes=4 * MIB, max_model_tokens=64, compiled_kernels=False)
    with serve_bases(files, tmp_path_factory.mktemp("served"), config, ("v1",)) as server:
        yield server


def answer(server: Server, name: str) -> str:
    body = {"model": name, "prompt": "who?", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", **body).json()["choices"][0]["text"]


def load(server: Server, name: str, folder: Path) -> tuple[int, str]:
    response = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))
    return response.status_code, response.text


def test_a_snapshot_with_leftovers_is_loaded_over_http(server: Server, files: Path, snapshot: Path):
    add_leftovers(snapshot)
    assert load(server, "plain", files / "adapter")[0] == load(server, "linked", snapshot)[0] == 200
    assert answer(server, "plain") == answer(server, "linked") != answer(server, "v1")
    routes = server.registry.routes()
    assert routes["plain"].live.content_hash == routes["linked"].live.content_hash


def test_embeddings_saved_beside_the_factors_are_no_reason_to_refuse(server: Server, files: Path, tmp_path: Path):
    folder = shutil.copytree(files / "adapter", tmp_path / "saved")
    weights, base = folder / "adapter_model.safetensors", open_checkpoint(files / "v1")
    saved = {f"base_model.model.{name}": base.load(name) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file({**load_file(weights), **saved}, weights)
    assert load(server, "saved", folder)[0] == load(server, "plain", files / "adapter")[0] == 200
    assert answer(server, "saved") == answer(server, "plain")
    saved["base_model.model.lm_head.weight"] = saved["base_model.model.lm_head.weight"] * 1.1
    save_file({**load_file(weights), **saved}, weights)
    status, text = load(server, "trained", folder)
    assert status == 400
    assert "'lm_head.weight' was retrained" in text


def test_what_cannot_be_loaded_is_explained_over_http(server: Server, snapshot: Path, tmp_path: Path):
    weights = snapshot / "adapter_model.safetensors"
    (weights.parent / weights.readlink()).unlink()
    status, text = load(server, "broken", snapshot)
    assert status == 400
    assert "adapter_model.safetensors is a link to" in text
    weights.rename(snapshot / "adapter_model.bin")
    (snapshot / "adapter_model.bin").unlink()
    (snapshot / "adapter_model.bin").write_bytes(b"pickle")
    status, text = load(server, "binary", snapshot)
    assert status == 400
    assert "adapter_model.bin is pickled" in text


def test_a_folder_above_the_adapter_names_its_subfolders(files: Path):
    with pytest.raises(InvalidAdapterError, match=r"one of its subfolders\? adapter"):
        load_adapter(files)
