"""Fine-tunes a real model on a task, extracts adapters from it, and compares the quality of both when served.

All weights are trained: embeddings, norms and every linear. The learning rate is chosen on validation rows. Quality is
the share of test rows that the engine answers exactly with greedy decoding: with the tuned checkpoint as its base, and
with the old base and the extracted adapter.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.nn.functional import cross_entropy

from bench.facts import read_json
from bench.specialists import BenchTask, load_bench_task
from cluster.adapters.files import Adapter, load_adapter
from cluster.config.settings import ServingConfig
from cluster.storage.checkpoints import open_checkpoint
from cluster.storage.jsonl import write_lines
from readapt.extraction.extract import Settings, extract
from readapt.extraction.files import Extraction
from readapt.extraction.report import read_report
from readapt.extraction.verify import verify_into_report
from readapt.lowrank.spectra import Budget, EnergyShare, FixedRank, Knee, Rule
from readapt.training.data import Encoder, Row, collate, encoder_for
from readapt.training.evaluate import Evaluator
from readapt.training.lora import load_base
from readapt.training.optimiser import MAX_GRADIENT_NORM
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, Request, SamplingParams

LEARNING_RATES = (3e-4, 1e-3)
WARMUP_STEPS = 20
DEFAULT_ENERGY = 0.95
ENERGIES = (0.5, 0.8, 0.9, DEFAULT_ENERGY, 0.99)
RANKS = (4, 8, 16, 32, 64)
BUDGETS = (231_424, 462_848, 925_696)  # the parameters of ranks 8, 16 and 32 on this model


@dataclass(frozen=True)
class Recipe:
    """One full fine-tuning with AdamW, a cosine schedule and clipped gradients. Rows are drawn with replacement."""

    task: str
    steps: int = 300
    batch_rows: int = 16
    seed: int = 0


def measure(kit: Path, work: Path, recipe: Recipe, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune a model (unless `work` has it), extract, verify and serve. Qualities are points on the test rows."""
    base = kit / "models" / "stories3m-v1"
    task = BenchTask(recipe.task)
    encoder = encoder_for(base, task.max_tokens)
    rows = load_bench_task(task, kit, encoder)
    tuned = work / f"tuned-{recipe.task}"
    if read_json(tuned / "recipe.json").get("of") != asdict(recipe):
        _tune(base, tuned, recipe, encoder, rows.train, rows.valid)
    out = work / f"extracted-{recipe.task}"
    shutil.rmtree(out, ignore_errors=True)
    rules: list[Rule] = [*map(EnergyShare, ENERGIES), *map(FixedRank, RANKS), *map(Budget, BUDGETS), Knee()]
    done = extract(open_checkpoint(base), open_checkpoint(tuned), out, Settings(tuple(rules)))
    verify_into_report(done, base, tuned, _test_file(work, recipe.task, rows.test))
    return _qualities(done, base, tuned, rows.test, say) | {
        "recipe": read_json(tuned / "recipe.json"),
        "verify": read_report(out)["verify"],
    }


def _qualities(
    done: Extraction, base: Path, tuned: Path, rows: Sequence[Row], say: Callable[[str], None]
) -> dict[str, Any]:
    result: dict[str, Any] = {"base": served(base, None, rows), "tuned": served(tuned, None, rows), "adapters": {}}
    facts = {adapter["rule"]: adapter for adapter in read_report(done.folder)["adapters"]}
    for label, folder in done.adapters.items():
        quality = served(base, load_adapter(folder), rows)
        chosen = {key: facts[label][key] for key in ("parameters", "energy", "rank_min", "rank_median", "rank_max")}
        result["adapters"][label] = {"quality": quality, **chosen}
        say(f"served: tuned {result['tuned']:.1f}, {label} {quality:.1f} ({facts[label]['parameters']:,} parameters)")
    return result


def served(base: Path, adapter: Adapter | None, rows: Sequence[Row]) -> float:
    """Return the percentage of rows that an engine on the CPU answers exactly with greedy decoding."""
    engine = Engine.open(base, TypeAdapter(ServingConfig).validate_python({"max_rank": 1024}))
    encoder = encoder_for(base, 256)
    ref = None if adapter is None else AdapterRef("extracted", "extracted", 1, "extracted")
    if ref is not None and adapter is not None:
        engine.add_adapter(ref, adapter)
    sampling = SamplingParams(temperature=0.0, max_tokens=16)
    for index, row in enumerate(rows):
        engine.submit(Request(str(index), tuple(encoder.encode_prompt(row.prompt)), sampling, ref))
    texts = dict.fromkeys(map(str, range(len(rows))), "")
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += event.text
    return 100 * sum(texts[str(i)].strip() == row.completion.strip() for i, row in enumerate(rows)) / len(rows)


def _tune(
    base: Path, tuned: Path, recipe: Recipe, encoder: Encoder, train: Sequence[Row], valid: Sequence[Row]
) -> None:
    found = {}
    for rate in LEARNING_RATES:
        model = _train(base, recipe, rate, encoder, train)
        found[rate] = Evaluator(model, encoder, valid, "exact_match")().quality, model
    best = max(found, key=lambda rate: found[rate][0])
    shutil.rmtree(tuned, ignore_errors=True)
    shutil.copytree(base, tuned)
    (tuned / "model.safetensors").unlink()
    found[best][1].save_pretrained(tuned)
    shutil.copy(base / "generation_config.json", tuned)  # `load_base` changes it for training
    by_rate = {str(rate): quality for rate, (quality, _) in found.items()}
    (tuned / "recipe.json").write_text(json.dumps({"of": asdict(recipe), "valid_quality": by_rate, "chosen": best}))


def _train(base: Path, recipe: Recipe, learning_rate: float, encoder: Encoder, rows: Sequence[Row]) -> Any:
    model = load_base(base).requires_grad_(True)
    encoded = encoder.encode_all(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps - WARMUP_STEPS)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [WARMUP_STEPS])
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.steps):
        chosen = torch.randint(len(encoded), (recipe.batch_rows,), generator=generator).tolist()
        batch = collate([encoded[index] for index in chosen])
        logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def _test_file(work: Path, task: str, rows: Sequence[Row]) -> Path:
    file = work / f"test-{task}.jsonl"
    write_lines(file, map(asdict, rows))
    return file
