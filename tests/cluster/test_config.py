import pickle
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from cluster.config.engines import EngineSpec
from cluster.config.fleet_file import load_fleet, model_fleet_file
from cluster.config.readapt import SearchConfig, TrainConfig, TransplantConfig
from cluster.config.reference import render
from cluster.config.settings import AdapterSpec, BaseSpec, Fleet, ServingConfig
from cluster.errors import ConfigError, InvalidRequestError, NotFoundError
from cluster.names import flat_name

EXAMPLE = Path(__file__).parents[2] / "fleet.toml"
BASES = '[[bases]]\nname = "v1"\npath = "models/v1"\n'
ADAPTER = '[[adapters]]\nname = "intent"\npath = "adapters/intent"\nbase = "v1"\ndata = "/data/intent"\n'


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    return file


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_fleet(write(tmp_path, text))
    return str(raised.value)


def test_the_example_is_the_generated_reference():
    assert render() == EXAMPLE.read_text(), "run `python -m cluster.config.reference > fleet.toml`"


def test_the_example_has_every_key_with_its_default():
    fleet = load_fleet(EXAMPLE)
    defaults = Fleet(name="example", folder=EXAMPLE.parent)
    assert (fleet.serving, fleet.readapt, fleet.rollout) == (defaults.serving, defaults.readapt, defaults.rollout)
    assert fleet.registry == f"sqlite:///{EXAMPLE.parent}/registry.db"
    assert fleet.blobs == str(EXAMPLE.parent / "blobs")
    assert fleet.packed == str(EXAMPLE.parent / ".cache" / "packed")
    assert [adapter.base for adapter in fleet.adapters] == ["v1"]
    raw = tomllib.loads(EXAMPLE.read_text())
    assert set(raw) == {field.name for field in fields(Fleet)} - {"folder", "engines"}
    assert set(raw["bases"][0]) == {field.name for field in fields(BaseSpec)}
    assert set(raw["adapters"][0]) == {field.name for field in fields(AdapterSpec)}
    for section in ("serving", "rollout", "readapt"):
        assert set(raw[section]) == {field.name for field in fields(getattr(defaults, section))}
    for section in raw["readapt"]:
        assert set(raw["readapt"][section]) == {field.name for field in fields(getattr(defaults.readapt, section))}


def test_the_example_documents_every_key():
    lines = EXAMPLE.read_text().split('name = "v2"')
    lines = [lines[0], lines[1].split("\n\n", 1)[1]]  # the second base has no comments
    previous = ""
    for line in "\n".join(lines).splitlines():
        assert not re.match(r"\w+ = ", line) or previous.startswith("# "), f"no comment above: {line}"
        previous = line


def test_the_example_of_an_engine_is_commented_out_and_has_every_key(tmp_path: Path):
    before, table = EXAMPLE.read_text().split("# [[engines]]\n")
    table, after = table.split("\n\n", 1)
    keys = "\n".join(line.removeprefix("# ") for line in table.splitlines() if re.match(r"# \w+ = ", line))
    fleet = load_fleet(write(tmp_path, f"{before}[[engines]]\n{keys}\n\n{after}"))
    example = EngineSpec(base="v2", url="http://127.0.0.1:8001")
    assert fleet.engines == (replace(example, adapters=str(tmp_path / ".cache" / "engine-adapters")),)
    assert fleet.engines_of("v2") == fleet.engines
    assert fleet.engines_of("v1") == ()
    assert set(tomllib.loads(keys)) == {field.name for field in fields(EngineSpec)}


def test_an_engines_address_may_end_with_v1(tmp_path: Path):
    table = '[[engines]]\nbase = "v1"\nurl = "https://gpu-1:8000/v1/"\n'
    assert load_fleet(write(tmp_path, f'name = "f"\n{BASES}{table}')).engines[0].url == "https://gpu-1:8000"


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ('base = "v3"\nurl = "http://h"', "engines[0].base: no base 'v3' among: v1"),
        ('base = "v1"\nurl = "gpu-1:8000"', "engines[0].url: Not a web address: 'gpu-1:8000'"),
        (
            'base = "v1"\nurl = "http://h"\nkind = "tgi"',
            "engines[0].kind: Input should be 'vllm'",
        ),
    ],
)
def test_a_wrong_engine_is_refused_by_key(tmp_path: Path, table: str, fault: str):
    assert fault in complaint(tmp_path, f'name = "f"\n{BASES}[[engines]]\n{table}\n')


def test_a_fleet_file_needs_little_and_its_paths_become_absolute(tmp_path: Path):
    fleet = load_fleet(write(tmp_path, f'name = "f"\n{BASES}{ADAPTER}'))
    assert fleet.folder == tmp_path
    assert fleet.bases[0].path == tmp_path / "models/v1"
    assert fleet.adapters[0].path == tmp_path / "adapters/intent"
    assert fleet.adapters[0].data == Path("/data/intent")
    assert fleet.adapters[0].metric == "exact_match"
    assert fleet.registry == f"sqlite:///{tmp_path}/registry.db"
    assert fleet.serving.memory_bytes == 256 * 1024**2


def test_paths_are_relative_to_the_file_and_not_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, f'name = "f"\n{BASES}')
    monkeypatch.chdir(tmp_path)
    assert load_fleet(Path("fleet.toml")).bases[0].path == tmp_path / "models/v1"


def test_urls_stay_as_they_are(tmp_path: Path):
    text = 'name = "f"\nregistry = "postgresql+psycopg://u:p@db/relora"\nblobs = "s3://bucket/fleet"\n'
    fleet = load_fleet(write(tmp_path, text))
    assert (fleet.registry, fleet.blobs) == ("postgresql+psycopg://u:p@db/relora", "s3://bucket/fleet")


def test_a_hub_id_can_name_a_base(tmp_path: Path):
    text = 'name = "f"\n[[bases]]\nname = "Qwen/Qwen2.5-0.5B"\npath = "models/qwen"\n'
    assert load_fleet(write(tmp_path, text)).bases[0].path == tmp_path / "models/qwen"


def test_a_model_gets_a_fleet_file_that_its_owner_may_change(tmp_path: Path):
    model = tmp_path / "models" / "v1"
    model.mkdir(parents=True)
    file = model_fleet_file(str(model), tmp_path / ".relora")
    assert file == tmp_path / ".relora/v1/fleet.toml"
    fleet = load_fleet(file)
    assert (fleet.name, fleet.bases, fleet.adapters) == ("v1", (BaseSpec(name="v1", path=model),), ())
    file.write_text(file.read_text() + "[serving]\nport = 9000\n")
    assert load_fleet(model_fleet_file(str(model), tmp_path / ".relora")).serving.port == 9000


@pytest.mark.parametrize(
    ("model", "name"),
    [("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("org/tiny@main", "org/tiny"), ("s3://bucket/bases/v1", "v1")],
)
def test_a_model_may_be_a_hub_id_or_a_url(tmp_path: Path, model: str, name: str):
    for _ in range(2):
        (base,) = load_fleet(model_fleet_file(model, tmp_path)).bases
        assert (base.name, str(base.path).removeprefix(f"{tmp_path}/{flat_name(name)}/")) == (name, model)


def test_two_models_of_one_name_do_not_share_a_fleet_file(tmp_path: Path):
    for parent in ("a", "b"):
        (tmp_path / parent / "v1").mkdir(parents=True)
    model_fleet_file(str(tmp_path / "a/v1"), tmp_path)
    with pytest.raises(ConfigError, match=r"fleet\.toml serves .*a/v1, not .*b/v1"):
        model_fleet_file(str(tmp_path / "b/v1"), tmp_path)


def test_a_model_folder_whose_name_cannot_be_one_is_refused(tmp_path: Path):
    (tmp_path / "my model").mkdir()
    with pytest.raises(InvalidRequestError, match="it contains ' '"):
        model_fleet_file(str(tmp_path / "my model"), tmp_path)


def test_the_error_for_an_unknown_base_lists_the_known_ones(tmp_path: Path):
    fleet = load_fleet(write(tmp_path, f'name = "f"\n{BASES}'))
    with pytest.raises(NotFoundError, match=r"'v7'.*v1"):
        fleet.base("v7")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[readapt.search]\ntrials = 0", "fleet.toml: readapt.search.trials: Input should be greater than 0"),
        (
            "[readapt.search]\ntrails = 3",
            "trails: There is no such key. Did you mean 'readapt.search.trials'?",
        ),
        ("[servng]\nport = 1", "fleet.toml: servng: There is no such key. Did you mean 'serving'?"),
        ("max_rank = 8", "max_rank: There is no such key. Did you mean 'serving.max_rank'?"),
        ("[serving]\nsteps_full = 8", "serving.steps_full: There is no such key."),
        (BASES + "paht = 'x'", "bases[0].paht: There is no such key. Did you mean 'bases.path'?"),
        ('[serving]\nport = "8000"', "serving.port: Input should be a valid integer"),
        ("[serving]\nport = 70000", "serving.port: "),
        ('[serving]\ncors_origins = ["localhost:3000"]', "serving.cors_origins[0]: Not an origin: 'localhost:3000'"),
        ('[serving]\ncors_origins = ["*", "http://a.de/"]', "serving.cors_origins[1]: Not an origin: 'http://a.de/'"),
        ('[serving]\ncors_origins = "*"', "serving.cors_origins: "),
        ("[serving]\nthreads = true", "serving.threads: "),
        ("[serving]\nmemory_bytes = 1.5", "serving.memory_bytes: "),
        ('[serving]\ndtype = "float64"', "serving.dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        ("[serving]\nmin_replicas = 3\nmax_replicas = 2", "serving.max_replicas: "),
        ("[readapt.search]\nbeta_min = 2.0", "readapt.search.beta_max: "),
        ("[readapt.search]\nbeta_min = 0.0\nbeta_max = 0.0", "readapt.search.beta_max: Input should be greater"),
        ("[readapt.ladder]\nrungs = []", "readapt.ladder.rungs: Input should have at least one rung"),
        ('[readapt.ladder]\nrungs = ["copy", "copy"]', "readapt.ladder.rungs: Input should name no rung twice"),
        ('[readapt.ladder]\nrungs = ["train", "scratch"]', "readapt.ladder.rungs: 'train' should come after a start"),
        ('[readapt.ladder]\nrungs = ["train", "copy"]', "readapt.ladder.rungs: 'train' should come after a start"),
        (
            "[serving]\nmax_rank = 16\n[readapt.transplant]\nrank = 17",
            "readapt.transplant.rank: Input should be at most",
        ),
        (
            "[readapt.transplant]\nwide_rank = 256",
            "readapt.transplant.wide_rank: Input should be at most serving.max_rank",
        ),
        ("[serving]\nmax_rank = 16\n[readapt]\ntransplant = 3", "readapt.transplant: "),
        ("[readapt.train]\nlearning_rate = nan", "readapt.train.learning_rate: "),
        ("[rollout]\ncanary_share = 1.5", "rollout.canary_share: "),
        ("serving = 3", "serving: "),
        ('folder = "x"', "folder: There is no such key."),
        ('registry = "registry.db"', "registry: Not a database URL"),
        (f'{BASES}[[bases]]\nname = "../v2"\npath = "x"', "bases[1].name: Bad name '../v2'"),
        (BASES + BASES, "bases[1].name: 'v1' is already the name of bases[0]"),
        (BASES + ADAPTER + ADAPTER, "adapters[1].name: 'intent' is already the name of adapters[0]"),
        (BASES + ADAPTER.replace("intent", "v1"), "adapters[0].name: 'v1' is already the name of bases[0]"),
        (BASES + ADAPTER + 'metric = "bleu"', "adapters[0].metric: "),
        (BASES + ADAPTER + "traffic = -1", "adapters[0].traffic: "),
    ],
)
def test_a_bad_value_is_named_by_its_key(tmp_path: Path, text: str, words: str):
    assert words in complaint(tmp_path, f'name = "f"\n{text}\n')


def test_a_ladder_without_a_transplant_does_not_check_its_rank(tmp_path: Path):
    text = 'name = "f"\n[serving]\nmax_rank = 16\n[readapt.ladder]\nrungs = ["fused", "train"]\n'
    assert load_fleet(write(tmp_path, text)).readapt.ladder.rungs == ("fused", "train")


@pytest.mark.parametrize(("limit", "ranks"), [(16, (16, 16)), (100, (64, 100)), (512, (64, 128))])
def test_both_ranks_of_a_transplant_default_to_at_most_the_engines_limit(
    tmp_path: Path, limit: int, ranks: tuple[int, int]
):
    fleet = load_fleet(write(tmp_path, f'name = "f"\n[serving]\nmax_rank = {limit}\n'))
    assert (fleet.readapt.transplant.rank, fleet.readapt.transplant.wide_rank) == ranks


def test_all_faults_are_reported_at_once_one_per_line(tmp_path: Path):
    lines = complaint(tmp_path, "[serving]\nport = -1\nspeed = 9\n[rollout]\npoll_s = 0\n").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["name", "serving.port", "serving.speed", "rollout.poll_s"]


def test_malformed_toml_is_reported_with_its_line(tmp_path: Path):
    assert "line 3" in complaint(tmp_path, 'name = "f"\n\nblobs = = 3\n')
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_fleet(tmp_path / "absent.toml")


def test_a_fleet_is_frozen_and_can_be_pickled(tmp_path: Path):
    fleet = load_fleet(EXAMPLE)
    assert pickle.loads(pickle.dumps(fleet)) == fleet
    with pytest.raises(AttributeError):
        fleet.name = "other"  # type: ignore[misc]


def test_a_rank_that_is_given_is_kept(tmp_path: Path):
    fleet = load_fleet(write(tmp_path, 'name = "f"\n[serving]\nmax_rank = 32\n[readapt.transplant]\nrank = 8\n'))
    assert fleet.readapt.transplant.ranks == (8, 32)
    assert fleet.readapt.transplant.widened().ranks == (32, 32)


def test_settings_that_belong_to_no_fleet_have_the_default_ranks():
    assert TransplantConfig().ranks == (64, 128)
    assert TransplantConfig().widened().ranks == (128, 128)


@pytest.mark.parametrize("section", [ServingConfig, TrainConfig, SearchConfig])
def test_code_can_build_single_sections(section: type):
    assert TypeAdapter(section).validate_python(section()) == section()
