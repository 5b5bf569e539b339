"""The re-adaptation benchmark: figures checked by hand, what runs and what is not repeated, and one real run."""

import json
import lzma
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench.readapt import cells
from bench.readapt.arms import ARM_SETTINGS, ArmResult, GivenUpError, Place, ReadyAdapter, climb, digest
from bench.readapt.cells import Unit, run_unit
from bench.readapt.figures import Cell, all_figures, compare_shipped, details
from bench.readapt.records import Arm, Journal, Point, ReadyPoint, Record, RunSpec, Scored, forget
from bench.readapt.run import FULL, Settings, write_figures
from bench.readapt.scoring import score
from bench.readapt.updates import CORPORA, Update, UpdateRecipe, make_update
from bench.specialists import BenchTask, load_bench_task, make_specialist, write_bench_task
from cluster.adapters.files import load_adapter
from readapt.training.data import encoder_for
from readapt.training.evaluate import judge
from readapt.training.lora import blank, linear_shapes, load_base
from tests.worlds.serving import make_checkpoint

TASK = BenchTask("colours", steps=20, specialist_steps=6, search_rows=8, gate_rows=24, test_rows=16, max_tokens=64)


def record(
    arm: Arm, ttr_s: float | None, test: float = 90.0, *, update: str = "mild", seed: int = 0, rows: str = "1" * 100
) -> Record:
    scored = Scored(test, test, [100.0 * int(row) for row in rows])
    ready = None if ttr_s is None else ReadyPoint("train", 20, ttr_s, scored)
    stop, reference = "budget", 90.0
    return Record(update, "snips", seed, arm, "final", stop, 1e-3, reference, ready, "train", scored, 50.0, 49.0)


def cell(seed: int, *, ours: float | None, copy_ft: float | None, scratch: float | None, **more: str) -> list[Record]:
    times = {"ours": ours, "copy_ft": copy_ft, "scratch": scratch}
    timed = [record(arm, ttr_s, 92.0 if arm == "ours" else 90.0, seed=seed, **more) for arm, ttr_s in times.items()]
    return [*timed, record("v1", None, 95.0, seed=seed, **more)]


def test_figures_by_hand():
    records = cell(0, ours=2.0, copy_ft=6.0, scratch=20.0) + cell(1, ours=4.0, copy_ft=4.0, scratch=20.0)
    records += cell(0, ours=11.0, copy_ft=20.0, scratch=10.0, update="control")
    found = all_figures(records, packed_training_speedup=1.5)
    assert found == {
        "ttr_speedup_vs_scratch_median": 7.5,  # of 10 and 5
        "ttr_speedup_vs_scratch_max": 10.0,
        "ttr_speedup_vs_copy_ft_median": 2.0,  # of 3 and 1
        "fleet_speedup_vs_scratch": pytest.approx(40 / 6),
        "fleet_speedup_vs_copy_ft": pytest.approx(10 / 6),
        "quality_minus_scratch_mean_points": 2.0,
        "regressions_shipped": 0,
        "negative_control_overhead": pytest.approx(0.1),
        "packed_training_speedup": 1.5,
    }
    json.dumps(details(records))


def test_a_censored_baseline_counts_its_budget_and_a_censored_ours_counts_both():
    baseline_late = all_figures(cell(0, ours=2.0, copy_ft=None, scratch=20.0), None)
    assert baseline_late["ttr_speedup_vs_copy_ft_median"] == 25.0  # 50 s of budget: a lower bound
    ours_late = all_figures(cell(0, ours=None, copy_ft=6.0, scratch=20.0), None)
    assert ours_late["ttr_speedup_vs_scratch_median"] == pytest.approx(20 / (50 + 20))
    assert ours_late["ttr_speedup_vs_copy_ft_median"] == pytest.approx(6 / (50 + 6))


def test_tuning_runs_are_in_no_figure():
    records = cell(0, ours=2.0, copy_ft=6.0, scratch=20.0)
    tuning = replace(record("ours", 0.1), purpose="tune", learning_rate=2e-3)
    assert all_figures([*records, tuning], None) == all_figures(records, None)
    assert details([*records, tuning])["learning_rates"]["mild/snips/ours"]["0.002"]["ttr_s"] == 0.1


@pytest.mark.parametrize(("num_lost", "is_regression"), [(0, False), (2, False), (4, False), (9, True)])
def test_a_regression_is_more_than_tolerance_and_chance(num_lost: int, is_regression: bool):
    shipped = record("ours", 1.0, rows="0" * num_lost + "1" * (100 - num_lost))
    runs = {"ours": shipped, "v1": record("v1", None, 95.0), "scratch": record("scratch", 9.0, 90.0)}
    found = compare_shipped(Cell("mild", "snips", 0, runs), "ours")
    assert found is not None
    assert found.reference == "scratch"  # the lower of the two
    assert found.difference == pytest.approx(-num_lost)
    assert found.is_established == is_regression


def test_an_adapter_that_missed_the_gate_is_not_shipped():
    runs = {"ours": record("ours", None, rows="0" * 100), "v1": record("v1", None), "scratch": record("scratch", 9.0)}
    assert compare_shipped(Cell("mild", "snips", 0, runs), "ours") is None


def test_journal_survives_a_kill_and_forgets_on_demand(tmp_path: Path):
    specs = [RunSpec("mild", "f00", TASK, seed, arm) for seed in (0, 1) for arm in ("copy", "ours")]
    journal = Journal(tmp_path / "j.jsonl")
    for spec in specs[:3]:
        journal.add(spec, record(spec.arm, 1.0, seed=spec.seed))
    whole = (tmp_path / "j.jsonl").read_bytes()
    (tmp_path / "j.jsonl").write_bytes(whole[:-40])  # the last line was cut short
    again = Journal(tmp_path / "j.jsonl")
    assert [again.find(spec) is not None for spec in specs] == [True, True, False, False]
    again.add(specs[2], record("copy", 1.0, seed=1))
    assert Journal(tmp_path / "j.jsonl").find(specs[2]) == record("copy", 1.0, seed=1)
    forget(tmp_path, ["ours"])
    assert [Journal(tmp_path / "j.jsonl").find(spec) is not None for spec in specs] == [True, False, True, False]


def test_another_setting_has_another_key():
    spec = RunSpec("mild", "f00", TASK, 0, "ours", learning_rate=1e-3)
    others = [replace(spec, base="f01"), replace(spec, learning_rate=2e-3), replace(spec, task=replace(TASK, steps=9))]
    assert len({spec.key, *(other.key for other in others)}) == 4


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit with tiny random bases, one task and short corpora."""
    folder = tmp_path_factory.mktemp("kit")
    for seed, name in enumerate(("stories3m-v1", "babyllama-a", "babyllama-b")):
        make_checkpoint(folder / "models" / name, seed=seed)
    rng = random.Random(0)
    for part, num_rows in (("train", 120), ("valid", 60), ("test", 60)):
        rows = [{"prompt": f"{part}{rng.random():.6f}", "completion": rng.choice("xyz")} for _ in range(num_rows)]
        path = folder / "tasks" / "colours" / f"{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, sorted(rows, key=lambda row: row["completion"]))) + "\n")
    (folder / "corpora").mkdir()
    for name in CORPORA:
        text = json.dumps({"text": f"{name} is a text of its own. " * 300})
        (folder / "corpora" / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def update(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Update:
    recipe = UpdateRecipe("mild", steps=6, learning_rate=3e-3, rows=(2, 1, 1), window_tokens=48)
    return make_update(recipe, kit, tmp_path_factory.mktemp("updates") / "mild")[0]


def test_an_update_is_trained_once_and_reports_what_it_did(kit: Path, tmp_path: Path):
    recipe = UpdateRecipe("mild", steps=6, learning_rate=3e-3, rows=(2, 1, 1), window_tokens=48)
    update, facts = make_update(recipe, kit, tmp_path / "mild")
    assert 0.001 < facts.relative_change < 0.5
    assert all(facts.perplexity_after[name] < facts.perplexity_before[name] for name in CORPORA)
    written = (update.new / "model.safetensors").stat().st_mtime_ns
    assert make_update(recipe, kit, tmp_path / "mild") == (update, facts)
    assert (update.new / "model.safetensors").stat().st_mtime_ns == written
    again = make_update(replace(recipe, seed=1), kit, tmp_path / "mild")[1]
    assert again.relative_change != facts.relative_change
    load_base(update.new)


def test_bench_rows_are_shuffled_distinct_and_disjoint(kit: Path):
    encoder = encoder_for(kit / "models" / "stories3m-v1", TASK.max_tokens)
    task = load_bench_task(replace(TASK, moved_rows=10, gate_rows=80), kit, encoder)
    assert (len(task.train), len(task.valid), len(task.test)) == (110, 70, 16)
    assert not set(task.train) & set(task.valid)
    assert [row.completion for row in task.test] != sorted(row.completion for row in task.test)


@pytest.mark.parametrize("metric", ["exact_match", "chrf"])
def test_scores_match_the_evaluator(kit: Path, metric: str):
    base = kit / "models" / "stories3m-v1"
    model, encoder = load_base(base), encoder_for(base, 64)
    rows = load_bench_task(TASK, kit, encoder).test
    adapter = blank(linear_shapes(model), 4, 8.0)
    quality, points = score(model, adapter, encoder, rows, metric)
    assert quality == pytest.approx(judge(model, adapter, encoder, rows, metric).quality)
    assert len(points) == len(rows)


class FakeArms:
    """Stands in for the arms: scratch is ready after 30 s, others sooner, and soonest at a learning rate of 2e-3."""

    def __init__(self) -> None:
        self.specs: list[RunSpec] = []

    def __call__(self, spec: RunSpec, place: Place, limit_steps: float) -> ArmResult:
        if spec.task.steps == 1:
            return self._climb(spec, place)  # the warm-up
        self.specs.append(spec)
        return self._climb(spec, place)

    def _climb(self, spec: RunSpec, place: Place) -> ArmResult:
        adapter = load_adapter(place.adapter)
        rate = spec.learning_rate or 1.0
        seconds = 30.0 if spec.arm == "scratch" else 3.0 + abs(rate - 2e-3) * 1000
        ready = ReadyAdapter("train", round(10 * seconds), seconds, adapter)
        curve = [Point("train", step, 3.0 * step, 50.0) for step in (0, 10, 20)]
        return ArmResult(ready, "train", adapter, 60.0, 59.0, {}, curve)


def unit_of(kit: Path, update: Update, work: Path) -> Unit:
    return Unit(update, TASK, (0, 1), kit, work)


def test_a_unit_tunes_on_the_first_seed_and_runs_each_arm_once_per_seed(kit: Path, update: Update, tmp_path: Path):
    arms = FakeArms()
    records = run_unit(unit_of(kit, update, tmp_path), arms, say=lambda line: None)
    tuned = {spec.learning_rate for spec in arms.specs if spec.arm == "copy_ft" and spec.purpose == "tune"}
    assert tuned == {5e-4, 1e-3, 2e-3, 4e-3}  # three, and one beyond the edge where the best was
    assert {spec.seed for spec in arms.specs if spec.purpose == "tune"} == {0}
    final = [r for r in records if r.purpose == "final" and r.arm not in ("v1", "zero_shot", "copy", "scratch")]
    assert sorted((r.arm, r.seed) for r in final) == sorted(
        (arm, s) for arm in ("copy_ft", "paper", "ours", "data_free") for s in (0, 1)
    )
    assert {r.learning_rate for r in final if r.arm == "copy_ft"} == {2e-3}
    assert {spec.scratch_rate for spec in arms.specs if spec.arm == "ours"} == {
        r.learning_rate for r in records if r.arm == "scratch" and r.purpose == "final"
    }
    assert {spec.scratch_rate for spec in arms.specs if spec.arm != "ours"} == {None}
    found = all_figures(records, None)
    assert found["ttr_speedup_vs_copy_ft_median"] == pytest.approx(1.0)


def test_ours_is_not_tuned_if_it_trains_from_scratch(kit: Path, update: Update, tmp_path: Path):
    class FromScratch(FakeArms):
        def _climb(self, spec: RunSpec, place: Place) -> ArmResult:
            found = super()._climb(spec, place)
            return replace(found, curve=[Point("scratch", 10, 5.0, 50.0)]) if spec.arm == "ours" else found

    arms = FromScratch()
    run_unit(replace(unit_of(kit, update, tmp_path), seeds=(0,)), arms, say=lambda line: None)
    tuned = [spec.arm for spec in arms.specs if spec.purpose == "tune"]
    assert (tuned.count("ours"), tuned.count("copy_ft")) == (1, 4)


def test_a_second_run_repeats_nothing(kit: Path, update: Update, tmp_path: Path):
    first, second = FakeArms(), FakeArms()
    records = run_unit(unit_of(kit, update, tmp_path), first, say=lambda line: None)
    assert sorted(map(repr, run_unit(unit_of(kit, update, tmp_path), second, say=lambda line: None))) == sorted(
        map(repr, records)
    )
    assert first.specs
    assert second.specs == []


def test_if_scratch_is_below_v1_the_gate_and_the_timing_use_its_quality(
    kit: Path, update: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def bad_on_new(self: object, adapter: object, *, on_old: bool = False, on_test: bool = True) -> Scored:
        return Scored(80.0 if on_old else 60.0, 70.0, [100.0, 0.0])

    monkeypatch.setattr(cells._UnitContext, "score", bad_on_new)
    arms = FakeArms()
    records = run_unit(replace(unit_of(kit, update, tmp_path), seeds=(0,)), arms, say=lambda line: None)
    timed = [spec for spec in arms.specs if spec.purpose == "timed"]
    assert [(spec.arm, spec.stop, spec.reference) for spec in timed] == [
        ("scratch", "ready", 60.0),
        ("ours", "ready", 60.0),
    ]
    assert {r.reference for r in records if r.purpose == "final" and r.arm not in ("v1", "zero_shot")} == {60.0}


def test_ours_is_timed_as_in_a_campaign_and_scored_after_its_whole_budget(kit: Path, update: Update, tmp_path: Path):
    class Dropping(FakeArms):
        """A run up to readiness drops a trailing run, which costs 7 seconds here."""

        def _climb(self, spec: RunSpec, place: Place) -> ArmResult:
            found = super()._climb(spec, place)
            assert found.ready is not None
            is_dropped = spec.arm == "ours" and spec.stop == "ready"
            return (
                replace(found, ready=replace(found.ready, seconds=found.ready.seconds + 7.0)) if is_dropped else found
            )

    arms = Dropping()
    records = run_unit(replace(unit_of(kit, update, tmp_path), seeds=(0,)), arms, say=lambda line: None)
    final, full = (next(r for r in records if (r.arm, r.purpose) == ("ours", p)) for p in ("final", "full"))
    assert final.ready is not None
    assert full.ready is not None
    assert final.ready.seconds == full.ready.seconds + 7.0
    assert (final.stop, final.final) == ("budget", full.final)


def test_an_arms_configuration_is_part_of_a_runs_key(monkeypatch: pytest.MonkeyPatch):
    spec = {arm: RunSpec("mild", "f00", TASK, 0, arm, reference=80.0) for arm in ARM_SETTINGS}
    before = {arm: digest(one) for arm, one in spec.items()}
    assert digest(replace(spec["ours"], learning_rate=7e-3)) != before["ours"]
    other = replace(ARM_SETTINGS["copy_ft"], has_averaging=True)
    monkeypatch.setitem(ARM_SETTINGS, "copy_ft", other)
    assert [arm for arm, one in spec.items() if digest(one) != before[arm]] == ["copy_ft"]
    assert RunSpec("mild", "f00", TASK, 0, "ours", config="a").key != RunSpec("mild", "f00", TASK, 0, "ours").key


def test_every_arm_runs_on_real_models_and_is_timed_from_the_disk(kit: Path, update: Update, tmp_path: Path):
    records = run_unit(replace(unit_of(kit, update, tmp_path), seeds=(0,)), climb, say=lambda line: None)
    final = {r.arm: r for r in records if r.purpose == "final"}
    assert set(final) == {"v1", "zero_shot", "copy", "copy_ft", "paper", "ours", "scratch", "data_free"}
    timed = [final[arm] for arm in ARM_SETTINGS]
    assert all(r.error == "" and r.curve for r in timed)
    assert all(r.seconds >= r.curve[-1].seconds > r.stages["load"] for r in timed)
    assert all(r.ready is None or r.ready.seconds <= r.seconds for r in timed)
    assert all(("evolution" in final[arm].stages) == ("fused" in ARM_SETTINGS[arm].rungs) for arm in ARM_SETTINGS)
    assert final["data_free"].stages["relabel"] > 0
    assert len({r.learning_rate for r in records if r.arm == "scratch" and r.purpose == "tune"}) >= 3
    assert {run.reference for run in timed} == {min(final["v1"].final.gate, final["scratch"].final.gate)}


def test_a_run_that_can_no_longer_be_the_fastest_is_given_up(kit: Path, update: Update, tmp_path: Path):
    unit = replace(unit_of(kit, update, tmp_path), seeds=(0,))
    adapter = make_specialist(TASK, 0, update.old, kit, tmp_path)
    place = Place(update.old, update.new, adapter, write_bench_task(TASK, kit, update.old, tmp_path))
    spec = RunSpec("mild", "f00", unit.task, 0, "copy_ft", learning_rate=1e-3, reference=200.0)
    with pytest.raises(GivenUpError, match="given up"):
        climb(spec, place, limit_steps=10)


def test_the_report_has_all_keys_and_plots(tmp_path: Path):
    records = cell(0, ours=2.0, copy_ft=6.0, scratch=20.0) + cell(
        0, ours=None, copy_ft=None, scratch=9.0, update="severe"
    )
    records = [replace(r, curve=[Point("train", 0, 0.5, 10.0), Point("train", 10, 2.0, 90.0)]) for r in records]
    settings = Settings(tmp_path, tmp_path / "out.json", tmp_path, FULL)
    found = write_figures(settings, records, {"updates": []}, 3.0, Console(quiet=True))
    report = json.loads((tmp_path / "out.json").read_text())
    assert found.items() <= report.items()
    assert len(report["records"]) == len(records)
    assert {path.name for path in (tmp_path / "out_plots").iterdir()} == {"curves.png", "speedups.png"}
