"""Bases and adapters from buckets, folders and the local Hugging Face cache: in fleet.toml and over HTTP."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import huggingface_hub.constants
import pytest
import torch

from cluster.adapters.files import load_adapter
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import MIB, ServingConfig
from cluster.errors import ConfigError, InvalidRequestError, NotFoundError, StorageError
from cluster.fleet import open_fleet
from cluster.storage import sources
from cluster.storage.blobs import open_filesystem
from cluster.storage.sources import local_folder
from tests.cluster.test_blobs import s3_credentials, s3_server, s3_url  # noqa: F401 (fixtures)
from tests.worlds.servers import Server, serve_bases
from tests.worlds.serving import make_adapter, make_checkpoint

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "v1")
    make_adapter(folder / "adapter", folder / "v1", rank=3)
    return folder


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return a function that gives the URL of a folder in a new bucket."""
    request.getfixturevalue("s3_credentials")
    server, name = request.getfixturevalue("s3_server"), f"bucket-{uuid.uuid4().hex}"
    assert httpx.put(f"http://{server}/{name}").status_code == 200
    return lambda folder: s3_url(server, name).replace("fleet/blobs", folder)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Let each test see the state of its bucket, as a new process does."""
    sources._fetched.cache_clear()
    yield
    sources._fetched.cache_clear()


def upload(folder: Path, url: str) -> None:
    filesystem, root = open_filesystem(url)
    for file in folder.rglob("*"):
        if file.is_file():
            with filesystem.open(f"{root}/{file.relative_to(folder).as_posix()}", "wb") as stream:
                stream.write(file.read_bytes())


def cached_repository(cache: Path, repo: str, folder: Path, revision: str = REVISION) -> Path:
    """Put a folder into a Hugging Face cache, as `hf download` does, and return the snapshot."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text(revision)
    for file in folder.iterdir():
        blob = repository / "blobs" / uuid.uuid4().hex
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def assert_same_adapter(folder: Path, other: Path) -> None:
    first, second = load_adapter(folder), load_adapter(other)
    assert first.factors.keys() == second.factors.keys()
    assert all(torch.equal(factors.a_RD, second.factors[name].a_RD) for name, factors in first.factors.items())


def test_a_bucket_is_fetched_once_without_what_does_not_count(
    files: Path, bucket: Callable[[str], str], tmp_path: Path
):
    published = shutil.copytree(files / "adapter", tmp_path / "published")
    (published / "optimizer.pt").write_bytes(b"x" * 1000)
    (published / "README.md").write_text("# mine")
    url = bucket("team/adapter")
    upload(published, url)
    folder = local_folder(url, tmp_path / "kept")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same_adapter(folder, files / "adapter")
    written = (folder / "adapter_config.json").stat().st_mtime_ns
    sources._fetched.cache_clear()
    assert local_folder(url, tmp_path / "kept") == folder
    assert (folder / "adapter_config.json").stat().st_mtime_ns == written
    assert [one.name for one in (tmp_path / "kept").iterdir()] == [folder.name]


def test_a_changed_bucket_gives_another_folder(files: Path, bucket: Callable[[str], str], tmp_path: Path):
    url = bucket("adapter")
    upload(files / "adapter", url)
    before = local_folder(url, tmp_path / "kept")
    upload(make_adapter(tmp_path / "newer", files / "v1", rank=5), url)
    sources._fetched.cache_clear()
    after = local_folder(url, tmp_path / "kept")
    assert load_adapter(before).max_rank == 3
    assert load_adapter(after).max_rank == 5


def test_a_fetch_that_fails_leaves_nothing(
    files: Path, bucket: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from fsspec.implementations.arrow import ArrowFSWrapper

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    url = bucket("adapter")
    upload(files / "adapter", url)
    with monkeypatch.context() as patch:
        patch.setattr(ArrowFSWrapper, "get_file", fail)
        with pytest.raises(StorageError, match="No space"):
            local_folder(url, tmp_path / "kept")
    assert list((tmp_path / "kept").glob("*")) == []
    assert load_adapter(local_folder(url, tmp_path / "kept")).max_rank == 3


def test_an_empty_place_and_an_unknown_scheme_are_named(bucket: Callable[[str], str], tmp_path: Path):
    with pytest.raises(NotFoundError, match="no files of a model or an adapter"):
        local_folder(bucket("nothing"), tmp_path)
    with pytest.raises(InvalidRequestError, match=r"unknown scheme 'ftp'.*s3://, gs://"):
        local_folder("ftp://host/adapter", tmp_path)


def test_a_hub_id_is_found_in_the_local_cache(files: Path, hub: Path, tmp_path: Path):
    snapshot = cached_repository(hub, "org/adapter", files / "adapter")
    assert local_folder("org/adapter", tmp_path) == snapshot
    assert local_folder(tmp_path / "org/adapter", tmp_path, tmp_path) == snapshot
    assert local_folder("org/adapter@" + REVISION, tmp_path) == snapshot
    assert_same_adapter(snapshot, files / "adapter")
    for missing in ("org/other", "org/adapter@v7"):
        with pytest.raises(NotFoundError, match=r"no such folder.*local Hugging Face cache.*hf download"):
            local_folder(missing, tmp_path)
    (tmp_path / "org/adapter").mkdir(parents=True)
    assert local_folder("org/adapter", tmp_path, tmp_path) == tmp_path / "org/adapter", "a folder comes first"


def write_fleet(folder: Path, base: str, adapter: str) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    for split in ("train", "valid"):
        (folder / f"data/{split}.jsonl").write_text(json.dumps({"prompt": "a?", "completion": "b"}) + "\n")
    (folder / "fleet.toml").write_text(
        f'name = "f"\n[[bases]]\nname = "v1"\npath = "{base}"\n'
        f'[[adapters]]\nname = "bot"\npath = "{adapter}"\nbase = "v1"\ndata = "data"\n'
    )
    return folder / "fleet.toml"


def test_a_fleet_takes_base_and_adapter_from_a_bucket(files: Path, bucket: Callable[[str], str], tmp_path: Path):
    for name in ("v1", "adapter"):
        upload(files / name, bucket(name))
    opened = open_fleet(load_fleet(write_fleet(tmp_path, bucket("v1"), bucket("adapter"))))
    [version] = opened.new_versions
    assert version.label == "bot@1"
    assert_same_adapter(opened.blobs.fetch_folder(str(version.blob_key)), files / "adapter")
    assert (opened.config.base("v1").path / "model.safetensors").is_file()
    assert open_fleet(opened.config).new_versions == ()


def test_a_fleet_takes_base_and_adapter_from_the_hub_s_cache(files: Path, hub: Path, tmp_path: Path):
    cached_repository(hub, "org/base", files / "v1")
    cached_repository(hub, "org/adapter", files / "adapter")
    fleet = load_fleet(write_fleet(tmp_path, "org/base", "org/adapter"))
    [version] = open_fleet(fleet).new_versions
    assert version.label == "bot@1"
    assert fleet.base("v1").path == hub / "models--org--base/snapshots" / REVISION


@pytest.mark.parametrize(
    ("base", "adapter", "data", "message"),
    [
        ("ftp://host/v1", "a", "data", r"bases\[0\]\.path: .*unknown scheme 'ftp'"),
        ("v1", "https://host/a", "data", r"adapters\[0\]\.path: .*unknown scheme 'https'"),
        ("v1", "a", "s3://bucket/data", r"adapters\[0\]\.data: A URL is not supported here"),
    ],
)
def test_urls_of_an_unknown_kind_are_errors_of_the_fleet_file(
    tmp_path: Path, base: str, adapter: str, data: str, message: str
):
    file = write_fleet(tmp_path, base, adapter)
    file.write_text(file.read_text().replace('"data"', f'"{data}"'))
    with pytest.raises(ConfigError, match=message):
        load_fleet(file)


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = ServingConfig(memory_bytes=4 * MIB, max_model_tokens=64, compiled_kernels=False)
    with serve_bases(files, tmp_path_factory.mktemp("served"), config, ("v1",)) as server:
        yield server


def test_adapters_are_loaded_from_a_bucket_and_by_hub_id(
    server: Server, files: Path, bucket: Callable[[str], str], hub: Path
):
    def load(name: str, path: str) -> httpx.Response:
        return server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path)

    def answer(name: str) -> str:
        body = {"model": name, "prompt": "who?", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        return server.post("/v1/completions", **body).json()["choices"][0]["text"]

    upload(files / "adapter", bucket("adapter"))
    cached_repository(hub, "org/adapter", files / "adapter")
    places = {"folder": str(files / "adapter"), "bucket": bucket("adapter"), "hub": "org/adapter"}
    assert [load(name, path).status_code for name, path in places.items()] == [200] * 3
    assert len({answer(name) for name in places}) == 1
    assert answer("folder") != answer("v1")
    for path, word in (("org/none", "hf download"), ("http://x/y", "unknown scheme"), (bucket("none"), "no files")):
        refused = load("none", path)
        assert refused.status_code == 400
        assert word in refused.json()["error"]["message"]
