from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.adapters.files import Adapter
from cluster.config.readapt import TransplantConfig
from cluster.errors import InvalidCheckpointError, TrainingError
from readapt.ladder.layer_walk import check_walk
from readapt.ladder.regression import HeadMap, Regression
from readapt.ladder.starts import calibration_rows
from readapt.ladder.transplant import transplant
from readapt.training.data import Encoded, by_length
from readapt.training.evaluate import judge
from readapt.training.lora import attach, attached, load_base, row_norms
from tests.worlds.precision import FORWARD, assert_near, tolerance
from tests.worlds.readapt import TaskWorld, evolve, logits, make_world
from tests.worlds.serving import make_checkpoint

CONFIG = TransplantConfig(rank=8, energy=1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("transplant"))


def rows_of(world: TaskWorld, num_rows: int = 200) -> list[Encoded]:
    return by_length(world.encoder.encode_all(world.task.train[:num_rows]))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_map(x_UD, y_UF, ridge: float, centre_FD) -> torch.Tensor:
    """Return the full-rank solution of the normal equations, in double precision."""
    x_UD, y_UF = x_UD.double(), y_UF.double()
    gram_DD = x_UD.T @ x_UD
    penalty = ridge * gram_DD.diagonal().mean()
    inner_DF = x_UD.T @ y_UF + penalty * centre_FD.double().T
    return torch.linalg.solve(gram_DD + penalty * torch.eye(len(gram_DD)), inner_DF).T


@pytest.mark.parametrize("has_centre", [False, True])
def test_regression_solves_the_ridge_problem(has_centre: bool) -> None:
    x_UD, y_UF = random(90, 13, seed=0), random(90, 7, seed=1)
    centre_FD = random(7, 13, seed=3) if has_centre else torch.zeros(7, 13)
    regression = Regression(x_UD, ridge=0.05)
    a_RD, b_FR, energy = regression.solve(y_UF, 7, centre_FD if has_centre else None)
    assert_near(b_FR @ a_RD, reference_map(x_UD, y_UF, 0.05, centre_FD), multiple=4 * 13)
    assert energy == pytest.approx(1.0, rel=tolerance(1.0, 4 * 13))


def test_the_cut_is_the_best_of_its_rank_in_the_metric_of_the_outputs() -> None:
    """Random competitors and the plain SVD of the weights are all worse (Eckart and Young, in the metric of G)."""
    scales_D = torch.logspace(0, -2, 13)
    x_UD, y_UF = random(300, 13, seed=0) * scales_D, random(300, 9, seed=1)
    regression = Regression(x_UD, ridge=1e-2)
    full_FD = reference_map(x_UD, y_UF, 1e-2, torch.zeros(9, 13)).float()
    gram_DD = x_UD.T @ x_UD
    gram_DD.diagonal().add_(1e-2 * gram_DD.diagonal().mean())

    def distance(cut_FD: torch.Tensor) -> float:
        lost_FD = cut_FD - full_FD
        return float((lost_FD @ gram_DD * lost_FD).sum())

    a_RD, b_FR, energy = regression.solve(y_UF, 3)
    found = distance(b_FR @ a_RD)
    u_FR, s_R, v_RD = torch.linalg.svd(full_FD, full_matrices=False)
    assert found < 0.9 * distance((u_FR[:, :3] * s_R[:3]) @ v_RD[:3])
    nudged = [
        distance((b_FR + 0.01 * random(9, 3, seed=s)) @ (a_RD + 0.01 * random(3, 13, seed=s + 50))) for s in range(20)
    ]
    assert found < min(nudged)
    assert energy == pytest.approx(1 - found / float((full_FD @ gram_DD * full_FD).sum()), rel=1e-3)


def test_for_an_unchanged_base_the_transplant_is_the_old_adapter(world: TaskWorld) -> None:
    found = transplant(load_base(world.base), world.specialist, load_base(world.base), rows_of(world), CONFIG)
    lora = attach(model := load_base(world.base), world.specialist)
    expected = logits(model)
    lora.load(found.adapter)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=6e-2)
    assert min(found.energy.values()) > 0.999
    for name, old in world.specialist.factors.items():
        assert (found.adapter.factors[name].delta() - old.delta()).norm() < 2e-2 * old.delta().norm()


def as_dora(world: TaskWorld) -> Adapter:
    """Return the specialist with magnitudes that differ from the weights' norms."""
    norms = row_norms(load_base(world.base), world.specialist.factors)
    factors = {n: replace(f, magnitude_F=1.1 * norms[n]) for n, f in world.specialist.factors.items()}
    return replace(world.specialist, factors=factors)


def test_everything_a_dora_changes_is_carried_over(world: TaskWorld) -> None:
    """Its magnitudes have full rank; a plain adapter of full rank does the same."""
    old = as_dora(world)
    config = TransplantConfig(rank=256, energy=1.0)
    found = transplant(load_base(world.base), old, load_base(world.base), rows_of(world, 50), config)
    assert not found.adapter.is_dora
    weights = load_base(world.base)
    for name, like in old.factors.items():
        weight_FD = weights.get_submodule(name).weight
        expected_FD = like.adapted(weight_FD) - weight_FD
        assert (found.adapter.factors[name].delta() - expected_FD).norm() < 1e-2 * expected_FD.norm()


def test_values_that_are_not_finite_raise_an_error() -> None:
    x_UD, y_UF = random(30, 5, seed=0), random(30, 4, seed=1)
    with pytest.raises(TrainingError, match="not finite"):
        Regression(x_UD * torch.nan, 0.03)
    with pytest.raises(TrainingError, match="not finite"):
        Regression(x_UD, 0.03).solve(y_UF * torch.inf, 2)


def test_equal_inputs_are_factored_with_a_larger_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gram matrix of rank one, and a Cholesky that fails at the first penalty."""
    tried: list[torch.Tensor] = []
    cholesky = torch.linalg.cholesky_ex

    def fails_once(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tried.append(matrix)
        return cholesky(matrix if len(tried) > 1 else -matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_once)
    x_UD, y_UF = random(1, 6, seed=0).expand(30, 6), random(30, 4, seed=1)
    a_RD, b_FR, _ = Regression(x_UD, 0.03).solve(y_UF, 4)
    condition = 1 + 6 / 0.3  # of a Gram matrix of rank one with this penalty
    assert_near(b_FR @ a_RD, reference_map(x_UD, y_UF, 0.3, torch.zeros(4, 6)), multiple=4 * 6 * condition)


def test_the_rank_is_the_smallest_that_holds_the_energy_within_its_bounds() -> None:
    x_UD = random(200, 6, seed=0)
    map_FD = torch.diag(torch.tensor([8.0, 4.0, 1.0, 0.1, 0.0, 0.0]))
    regression, y_UF = Regression(x_UD, 1e-5), x_UD @ map_FD.T
    for share, min_rank, max_rank, rank in ((0.97, 1, 6, 2), (0.97, 1, 1, 1), (0.97, 4, 6, 4), (0.999, 1, 6, 3)):
        a_RD, b_FR, energy = regression.solve(y_UF, max_rank, min_rank=min_rank, energy=share)
        assert a_RD.shape[0] == b_FR.shape[1] == rank
        assert (energy >= share) == (max_rank > 1)


def test_calibration_rows_have_the_wanted_tokens_and_lose_an_unknown_end() -> None:
    rows = [Encoded((3, 4, 5, 9), 1), Encoded((3, 9, 5), 1), Encoded((3, 4, 5), 1)]
    assert calibration_rows(rows, 9, 100) == [Encoded((3, 4, 5), 1), Encoded((3, 4, 5), 1)]
    assert calibration_rows(rows, 10, 5) == [Encoded((3, 9, 5), 1), Encoded((3, 4, 5, 9), 1)]
    assert calibration_rows(rows, 10, 4) == rows[:1]
    assert calibration_rows(rows, 3, 100) == []


def test_if_there_is_nothing_to_add_the_factors_can_still_be_trained() -> None:
    a_RD, b_FR, energy = Regression(random(30, 5, seed=0), 0.03).solve(torch.zeros(30, 4), 2)
    assert energy == 1.0
    assert not a_RD.any()
    assert b_FR.norm(dim=0).min() > 1e-3


def test_decoders_of_another_family_are_refused(world: TaskWorld) -> None:
    """One decoder computes something else under the same names; another lacks the names."""
    model, rows = load_base(world.base), rows_of(world, 2)
    check_walk(model, rows)
    layer = model.base_model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output * 1.1)
    with pytest.raises(InvalidCheckpointError, match="layers differ"):
        transplant(load_base(world.base), world.specialist, model, rows, CONFIG)
    del layer.mlp.act_fn
    with pytest.raises(InvalidCheckpointError, match="act_fn"):
        check_walk(model, rows)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_at_full_rank_the_new_base_does_what_the_old_service_did(
    world: TaskWorld, tmp_path: Path, architecture: str
) -> None:
    """On the calibration rows, with almost no ridge. The families have biases, head norms and grouped heads."""
    old_base = make_checkpoint(tmp_path / "old", architecture, std=0.08)
    new_base = evolve(old_base, tmp_path / "new", rank=None, scale=0.3)
    teacher, student, rows = load_base(old_base), load_base(new_base), rows_of(world, 40)
    old = replace(world.specialist, base_model="")
    config = TransplantConfig(rank=256, energy=1.0, ridge=1e-5)
    found = transplant(teacher, old, student, rows, config)
    inputs = torch.tensor([rows[-1].input_ids])
    with torch.no_grad():
        bare = student(input_ids=inputs).logits
        with attached(teacher, old), attached(student, found.adapter):
            expected, got = teacher(input_ids=inputs).logits, student(input_ids=inputs).logits
    assert (got - expected).norm() < 0.05 * (bare - expected).norm()


def test_for_an_unchanged_head_the_target_is_the_teachers_stream(world: TaskWorld) -> None:
    model, answers_Y = load_base(world.base), torch.tensor([5, 6, 6])
    stream_UD = random(7, model.config.hidden_size, seed=0)
    assert_near(HeadMap(model, model, answers_Y)(stream_UD), stream_UD, FORWARD)


def test_for_a_rotated_head_the_target_has_the_same_logits(world: TaskWorld) -> None:
    """The new head and final norm read the stream in other coordinates."""
    teacher, student = load_base(world.base), load_base(world.base)
    width = teacher.config.hidden_size
    q_DD, _ = torch.linalg.qr(random(width, width, seed=1))
    student.get_output_embeddings().weight = torch.nn.Parameter(teacher.get_output_embeddings().weight @ q_DD)
    student.base_model.norm.weight.data = random(width, seed=2).abs() + 0.5
    stream_UD = random(7, width, seed=0)
    turned_UD = HeadMap(teacher, student, torch.tensor([5, 6, 6]))(stream_UD)

    def logits_of(model, stream_UD):
        # The gain changes the stream's norm, so the logits agree up to one factor per token.
        logits_UV = model.get_output_embeddings()(model.base_model.norm(stream_UD))
        return logits_UV / logits_UV.norm(dim=1, keepdim=True)

    with torch.no_grad():
        expected, found = logits_of(teacher, stream_UD), logits_of(student, turned_UD)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # the ridge, far above rounding errors


def test_what_the_new_head_cannot_see_is_unchanged(world: TaskWorld) -> None:
    """One gain of the norm is zero; nothing is divided by it."""
    teacher, student = load_base(world.base), load_base(world.base)
    for model in (teacher, student):
        model.base_model.norm.weight.data[3] = 0.0
    stream_UD = random(7, teacher.config.hidden_size, seed=0)
    answers_Y = torch.tensor([teacher.config.vocab_size + 5])  # nothing that both know
    assert_near(HeadMap(teacher, student, answers_Y)(stream_UD), stream_UD, FORWARD)


def test_it_repairs_a_full_rank_change_and_leaves_both_models_bare(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    teacher, student = load_base(world.base), load_base(new)
    before = logits(teacher), logits(student)
    found = transplant(teacher, world.specialist, student, rows_of(world), CONFIG)
    assert torch.equal(logits(teacher), before[0])
    assert torch.equal(logits(student), before[1])
    assert found.adapter.factors.keys() == world.specialist.factors.keys()
    quality = judge(student, found.adapter, world.encoder, world.task.valid, "exact_match").quality
    copied = judge(student, world.specialist, world.encoder, world.task.valid, "exact_match").quality
    assert quality > 90
    assert copied < quality - 10


def test_only_the_old_adapters_modules_are_adapted(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.1)
    some = {name: f for name, f in world.specialist.factors.items() if name.endswith(("q_proj", "down_proj"))}
    found = transplant(load_base(world.base), Adapter(some), load_base(new), rows_of(world, 50), CONFIG)
    assert found.adapter.factors.keys() == some.keys()


def test_ranks_are_as_configured_but_never_below_the_old_ones(world: TaskWorld) -> None:
    bases = load_base(world.base), load_base(world.base)
    low = transplant(bases[0], world.specialist, bases[1], rows_of(world, 50), TransplantConfig(rank=2))
    assert {f.rank for f in low.adapter.factors.values()} == {8}
    high = transplant(bases[0], world.specialist, bases[1], rows_of(world, 50), TransplantConfig(rank=20, energy=1.0))
    assert max(f.rank for f in high.adapter.factors.values()) == 20
