import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics.chrf import CHRF

from cluster.adapters.files import load_adapter
from cluster.config.readapt import GateConfig
from cluster.errors import InvalidDataError
from readapt.training import evaluate as evaluate_module
from readapt.training.data import Encoded, Encoder, Row, collate, encoder_for
from readapt.training.evaluate import Evaluation, Evaluator, Gate, Verdict, Watcher, golden, judge, label_logits
from readapt.training.greedy import greedy
from readapt.training.lora import attach, load_base
from tests.worlds.precision import FORWARD, assert_near
from tests.worlds.readapt import logits, make_rows
from tests.worlds.serving import EOS, make_adapter, make_checkpoint


def prompts(num: int) -> list[str]:
    return [row.prompt for row in make_rows(num, seed=3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("evaluate") / "v1")


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return encoder_for(checkpoint, 64)


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return load_base(checkpoint)


def greedy_one_by_one(model: Any, encoder: Encoder, prompt: str, max_tokens: int) -> list[int]:
    """Decode greedily in the simplest way: one full forward pass per token."""
    tokens = encoder.encode_prompt(prompt)
    for _ in range(max_tokens):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(encoder.encode_prompt(prompt)) :]


class Verbatim(Encoder):
    """Reads a completion as token ids, so that the answers of a random model can be targets."""

    def encode(self, row: Row) -> Encoded:
        prompt = self.encode_prompt(row.prompt)
        return Encoded((*prompt, *map(int, row.completion.split(",")), self.eos_id), len(prompt))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_exact_match_is_greedy_generation(tmp_path: Path, architecture: str) -> None:
    folder = make_checkpoint(tmp_path / "v1", architecture)
    model = load_base(folder)
    attach(model, load_adapter(make_adapter(tmp_path / "a", folder)))
    encoder = Verbatim(encoder_for(folder, 64).tokenizer, EOS, 64)
    with torch.no_grad():  # a random model rarely writes eos: make it likely, so that both cases occur
        model.get_output_embeddings().weight[EOS] *= 6.0
    rows, hits = [], 0
    for index, prompt in enumerate(prompts(60)):
        answer = greedy_one_by_one(model, encoder, prompt, 6)
        body = answer[:-1] if answer[-1] == EOS else answer
        if not body:
            continue
        if index % 3 == 0:
            body = [*body[:-1], (body[-1] + 1) % 250]  # a near miss
        rows.append(Row(prompt, ",".join(map(str, body))))
        hits += answer == [*body, EOS]
    assert 0 < hits < len(rows)
    evaluation = Evaluator(model, encoder, rows, "exact_match", batch_rows=7)()
    assert evaluation.quality == pytest.approx(100.0 * hits / len(rows))


def test_quality_does_not_depend_on_batching(model: Any, encoder: Encoder) -> None:
    rows = make_rows(41, seed=1)
    one, other = (Evaluator(model, encoder, rows, "exact_match", batch_rows=size)() for size in (1, 64))
    assert_near(one.loss, other.loss, FORWARD)
    assert one.quality == other.quality


def test_label_logits_equal_the_models_logits(model: Any, encoder: Encoder) -> None:
    rows = encoder.encode_all(make_rows(5, seed=2))
    with torch.no_grad():
        found_YV, labels_Y, rows_Y = label_logits(model, collate(rows))
        expected = [
            model(input_ids=torch.tensor([row.input_ids])).logits[0, row.num_prompt_tokens - 1 : -1] for row in rows
        ]
    assert_near(found_YV, torch.cat(expected), FORWARD)
    assert labels_Y.tolist() == [token for row in rows for token in row.input_ids[row.num_prompt_tokens :]]
    assert rows_Y.tolist() == [i for i, row in enumerate(rows) for _ in row.input_ids[row.num_prompt_tokens :]]


def test_golden_is_greedy_decoding_up_to_eos(model: Any, encoder: Encoder) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 6.0
    wanted = [greedy_one_by_one(model, encoder, prompt, 9) for prompt in prompts(20)]
    assert len({EOS in tokens for tokens in wanted}) == 2, "both kinds of end occur: eos and the length limit"
    texts = [encoder.decode([token for token in tokens if token != EOS]) for tokens in wanted]
    expected = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts(20), texts, strict=True)]
    assert golden(model, encoder, prompts(20), 9) == expected


def test_golden_stops_at_every_eos_of_the_model(model: Any, encoder: Encoder) -> None:
    prompt = prompts(1)[0]
    tokens = greedy_one_by_one(model, encoder, prompt, 5)
    several = Encoder(encoder.tokenizer, EOS, encoder.max_tokens, [EOS, tokens[2]])
    expected = encoder.decode(tokens[: tokens.index(tokens[2])])
    assert golden(model, several, [prompt], 5) == [{"prompt": prompt, "completion": expected}]


def test_chrf_is_full_for_the_models_own_answers_and_less_for_others(model: Any, encoder: Encoder) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 6.0
    ended = [p for p in prompts(40) if 4 < len(greedy_one_by_one(model, encoder, p, 30)) < 30]
    answers = golden(model, encoder, ended, 30)
    own = [Row(a["prompt"], a["completion"]) for a in answers]
    swapped = [Row(a["prompt"], b["completion"]) for a, b in zip(answers, reversed(answers), strict=True)]
    assert len(own) > 4
    assert Evaluator(model, encoder, own, "chrf", batch_rows=3)().quality == pytest.approx(100.0)
    assert Evaluator(model, encoder, swapped, "chrf")().quality < 80.0


def test_judge_leaves_the_model_bare(model: Any, encoder: Encoder, checkpoint: Path, tmp_path: Path) -> None:
    adapter = load_adapter(make_adapter(tmp_path / "a", checkpoint))
    rows, bare = make_rows(9, seed=4), logits(model)
    with_adapter = judge(model, adapter, encoder, rows, "exact_match")
    assert torch.equal(logits(model), bare)
    assert with_adapter.loss != pytest.approx(Evaluator(model, encoder, rows, "exact_match").loss(), rel=1e-3)


def test_the_gate_tolerates_exactly_its_points() -> None:
    gate = Gate(90.0, 1.0)
    assert gate.passes(89.0)
    assert not gate.passes(88.99)


def test_a_row_that_cannot_be_judged_leaves_the_model_bare(checkpoint: Path, encoder: Encoder, tmp_path: Path) -> None:
    """A worker judges one adapter after the other on one model, so each must start from the bare base."""
    model = load_base(checkpoint)
    bare = logits(model)
    adapter = load_adapter(make_adapter(tmp_path / "a", checkpoint))
    with pytest.raises(InvalidDataError, match="no room"):
        judge(model, adapter, encoder, [Row("p", "x" * 999)], "exact_match")
    assert torch.equal(logits(model), bare)


def test_generation_settings_of_a_checkpoint_do_not_change_greedy_answers(tmp_path: Path) -> None:
    """The engine uses only the request's settings, so it would never repeat golden answers made with a penalty."""
    folder = make_checkpoint(tmp_path / "v1")
    plain = golden(load_base(folder), encoder_for(folder, 64), prompts(4), max_tokens=24)
    settings = json.loads((folder / "generation_config.json").read_text())
    bent = settings | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 20}
    (folder / "generation_config.json").write_text(json.dumps(bent))
    assert golden(load_base(folder), encoder_for(folder, 64), prompts(4), max_tokens=24) == plain


@pytest.mark.parametrize(
    ("qualities", "ends_at"),
    [
        ([95, 90], 0),  # the start is evaluated only once, so one pass is enough
        ([50, 95, 95], 2),
        ([50, 95, 90, 95, 96], 4),
        ([50, 95, 90, 95], None),
        ([50, 60], None),
    ],
)
def test_a_run_ends_at_a_passing_start_or_after_two_passes_in_a_row(
    qualities: list[float], ends_at: int | None
) -> None:
    watcher = Watcher(Gate(reference=95.5, tolerance_points=1.0))
    verdicts = [watcher(Evaluation(0.1, quality)) for quality in qualities]
    assert next((i for i, verdict in enumerate(verdicts) if verdict is Verdict.READY), None) == ends_at


@pytest.mark.parametrize(
    ("losses", "last"),
    [
        ([1.0, 1.2, 1.1, 1.05], Verdict.DROP),
        ([1.0, 1.2, 0.9, 1.3], Verdict.GO_ON),
        ([1.0, 1.2, 1.1], Verdict.GO_ON),
        ([1.0, float("nan"), 1.1, 1.2], Verdict.DROP),
        ([1.0, float("nan"), 0.9, 1.2], Verdict.GO_ON),
        ([float("nan"), 1.2, 1.1, 1.2], Verdict.GO_ON),
    ],
)
def test_a_run_whose_loss_does_not_fall_is_dropped(losses: list[float], last: Verdict) -> None:
    watcher = Watcher(Gate(reference=95.0, tolerance_points=1.0), trial=3)
    assert [watcher(Evaluation(loss, 50.0)) for loss in losses][-1] is last


def test_losses_are_compared_on_the_rows_up_to_the_first_look() -> None:
    """The start is given up after its first, hard rows. The run is better overall, but not on these rows."""
    watcher = Watcher(Gate(reference=95.0, tolerance_points=1.0), trial=1)
    watcher(Evaluation(2.0, 0.0, 16, False, first_loss=2.0))
    assert watcher(Evaluation(1.5, 50.0, 100, True, first_loss=2.1)) is Verdict.DROP


def own_answers(model: Any, encoder: Encoder, num_rows: int, num_wrong: int) -> list[Row]:
    """Return rows that the model answers right, except the last `num_wrong`."""
    answers = [greedy_one_by_one(model, encoder, prompt, 3) for prompt in prompts(num_rows)]
    with_end = [(p, a[: a.index(EOS)] if EOS in a else a) for p, a in zip(prompts(num_rows), answers, strict=True)]
    texts = [(p, body or [7]) for p, body in with_end]
    right = [Row(p, ",".join(map(str, body))) for p, body in texts]
    return right[: num_rows - num_wrong] + [Row(r.prompt, "1,2,3") for r in right[num_rows - num_wrong :]]


class NoEnd(Verbatim):
    """Leaves out eos: the first tokens of a random model are the whole answer."""

    def encode(self, row: Row) -> Encoded:
        whole = super().encode(row)
        return Encoded(whole.input_ids[:-1], whole.num_prompt_tokens)


@pytest.mark.parametrize("num_wrong", [0, 12, 60, 100])
def test_an_evaluation_stops_early_only_to_fail_and_passes_only_on_all_rows(
    model: Any, encoder: Encoder, num_wrong: int
) -> None:
    reader = NoEnd(encoder.tokenizer, EOS, 64)
    rows = own_answers(model, encoder, 100, num_wrong)
    full = Evaluator(model, reader, rows, "exact_match")()
    assert full.is_complete
    assert full.quality >= 100 - num_wrong
    for reference in (0, 20, 41, 60, 88.5, 95, 101.5):
        gate = Gate(float(reference), 1.0)
        evaluate = Evaluator(model, reader, rows, "exact_match", gate=gate)
        found = evaluate()
        assert gate.passes(found.quality) == gate.passes(full.quality)
        assert found.is_complete == (found.num_rows == 100)
        assert found.is_complete or not gate.passes(full.quality)
        assert evaluate.complete().quality == pytest.approx(full.quality)
        assert_near(evaluate.complete().loss, full.loss, FORWARD)
        assert_near(evaluate.loss(), full.loss, FORWARD)
        assert found.first_loss == evaluate.complete().first_loss
    hopeless = Evaluator(model, reader, rows, "exact_match", gate=Gate(101.5, 1.0))()
    assert hopeless.num_rows == 16, "a gate that nothing passes"
    assert hopeless.first_loss == hopeless.loss
    assert full.first_loss == full.loss, "without a gate there is one look"


def test_equal_prompts_are_answered_once(model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-to-text tasks have several references for one prompt, and one greedy answer."""
    asked: list[int] = []

    def count(model: Any, encoder: Encoder, prompts: list[list[int]], *sizes: int, **named: int) -> list[str]:
        asked.append(len(prompts))
        return greedy(model, encoder, prompts, *sizes, **named)

    monkeypatch.setattr(evaluate_module, "greedy", count)
    distinct = [Row(prompt, f"answer {i}") for i, prompt in enumerate(prompts(10))]
    rows = [Row(row.prompt, f"{row.completion} {turn}") for turn in range(4) for row in distinct]
    once = Evaluator(model, encoder, rows, "chrf", gate=Gate(0.0, 0.0))()
    assert sum(asked) == len({row.prompt for row in rows})
    assert (once.num_rows, once.is_complete) == (40, True)
    given_up = Evaluator(model, encoder, rows, "chrf", gate=Gate(101.0, 0.0))
    assert (given_up().num_rows, given_up().is_complete) == (16, False), "a gate that nothing passes"
    assert given_up.complete().quality == pytest.approx(once.quality)
    texts = {a["prompt"]: a["completion"].strip() for a in golden(model, encoder, prompts(10), 19)}
    score = CHRF().corpus_score([texts[row.prompt] for row in rows], [[row.completion for row in rows]]).score
    assert once.quality == pytest.approx(score)


def test_a_gate_is_lowered_to_the_scratch_quality_but_not_below_its_floor() -> None:
    gate = Gate.beside(90.0, GateConfig(tolerance_points=1.0, max_drop_points=5.0))
    assert (gate.passes(89.0), gate.passes(88.9)) == (True, False)
    assert gate.lowered(95.0) == gate, "never higher"
    assert gate.lowered(87.0).passes(86.0)
    assert not gate.lowered(87.0).passes(85.9)
    assert gate.lowered(20.0).reference == 85.0, "an adapter that can no longer do its task is not shipped"
    assert not gate.lowered(20.0).lowered(10.0).passes(83.9)
