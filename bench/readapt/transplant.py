"""Benchmark of the functional transplant: what each part contributes, where it holds, and what it costs.

    relora bench transplant --kit DIR [--tasks snips,trec,clinc150] [--work DIR] [--threads 1] [--out FILE.json]

Update: the kit's stories3m-v1 -> stories3m-v2-strong; specialists of rank 8; no training. Held-out figures are of
validation rows. The two divergences are of the new service from the old one, in nats per token: on the task's own
prompts, and on prompts of the other tasks, which the transplant was not fitted on. Costs are of single sites of a
Llama-3-8B.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from torch.nn.functional import kl_div, log_softmax

from bench.specialists import TASKS, BenchTask, load_bench_task, make_specialist
from cluster.adapters.files import Adapter, load_adapter
from cluster.config.readapt import TransplantConfig
from readapt.fusion.search import subset
from readapt.ladder.regression import Regression
from readapt.ladder.starts import calibration_rows
from readapt.ladder.transplant import transplant
from readapt.training.data import Encoder, Row, Task, collate, encoder_for
from readapt.training.evaluate import judge
from readapt.training.lora import attached, load_base

OLD, NEW = "stories3m-v1", "stories3m-v2-strong"
GATE_ROWS = 400
PROMPT_ROWS = 100
VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes (rank up to 64, 12 tokens a unit of width)": {},
    "rank up to 8": {"rank": 8},
    "rank up to 16": {"rank": 16},
    "rank up to 32": {"rank": 32},
    "rank up to 128": {"rank": 128},
    "rank 64 everywhere": {"energy": 1.0},
    "energy 0.95": {"energy": 0.95},
    "6 tokens a unit": {"tokens_per_width": 6.0},
    "24 tokens a unit": {"tokens_per_width": 24.0},
    "48 tokens a unit": {"tokens_per_width": 48.0},
    "old head": {"map_head": False},
    "modules only, not the stream": {"match_stream": False, "map_head": False},
    "centred on zero": {"centre": "zero"},
    "ridge 1e-3": {"ridge": 1e-3},
    "ridge 3e-1": {"ridge": 3e-1},
}
SITES_8B = {"q/k/v, o": (4096, 4096), "gate": (4096, 14336)}
SITE_TOKENS, SITE_RANK = 8192, 32


@dataclass(frozen=True)
class Tried:
    """One variant on one task."""

    task: str
    variant: str
    loss: float
    quality: float
    cpu_seconds: float
    own_kl: float
    foreign_kl: float


class _Place:
    """The two bases and the old service of one task."""

    def __init__(self, kit: Path, work: Path, task: BenchTask):
        self.old_model, self.new_model = (load_base(kit / "models" / name) for name in (OLD, NEW))
        self.encoder: Encoder = encoder_for(kit / "models" / NEW, task.max_tokens)
        self.rows: Task = load_bench_task(task, kit, self.encoder)
        self.old = load_adapter(make_specialist(task, 0, kit / "models" / OLD, kit, work))

    def transplanted(self, config: TransplantConfig) -> tuple[Adapter, float]:
        """Return the adapter, and the CPU seconds it took."""
        rows = self.encoder.encode_all(subset(self.rows.train, config.rows, seed=0))
        num_tokens = round(config.tokens_per_width * self.new_model.config.hidden_size)
        rows = calibration_rows(rows, self.old_model.config.vocab_size, num_tokens)
        started = time.process_time()
        found = transplant(self.old_model, self.old, self.new_model, rows, config)
        return found.adapter, time.process_time() - started

    def kl(self, adapter: Adapter, rows: Sequence[Row]) -> float:
        """Return the divergence of the new base with this adapter from the old service, per token."""
        batch = collate(self.encoder.encode_all(rows))
        is_token_BT = batch.attention_mask_BT.bool()
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        with torch.no_grad(), attached(self.old_model, self.old), attached(self.new_model, adapter):
            logits = [model(**inputs, use_cache=False).logits for model in (self.old_model, self.new_model)]
        old_UV, new_UV = (log_softmax(logits_BTV[is_token_BT], dim=-1) for logits_BTV in logits)
        return float(kl_div(new_UV, old_UV, log_target=True, reduction="batchmean"))


def run(kit: Path, work: Path, tasks: Sequence[str], console: Console) -> dict[str, Any]:
    """Return all figures and print them as a table."""
    found = list(compare_variants(kit, work, tasks))
    console.print(_table(found))
    sites = site_seconds()
    console.print({name: {key: round(value, 1) for key, value in cost.items()} for name, cost in sites.items()})
    return {"tried": [asdict(tried) for tried in found], "sites_8b": sites}


def compare_variants(kit: Path, work: Path, tasks: Sequence[str]) -> Iterator[Tried]:
    """Try the copy and every variant on every task."""
    places = {task.name: _Place(kit, work, task) for task in TASKS if task.name in tasks}
    for name, place in places.items():
        own = place.rows.valid[:PROMPT_ROWS]
        foreign = [row for other, p in places.items() if other != name for row in p.rows.valid[:PROMPT_ROWS]]
        tries = [("copy", place.old, 0.0)]
        for variant, settings in VARIANTS.items():
            config = TypeAdapter(TransplantConfig).validate_python(settings)
            tries.append((variant, *place.transplanted(config)))
        for variant, adapter, cpu_seconds in tries:
            gate_rows = place.rows.valid[-GATE_ROWS:]
            found = judge(place.new_model, adapter, place.encoder, gate_rows, "exact_match")
            kls = [place.kl(adapter, rows) if rows else 0.0 for rows in (own, foreign)]
            yield Tried(name, variant, found.loss, found.quality, cpu_seconds, *kls)


def site_seconds() -> dict[str, dict[str, float]]:
    """Return the CPU seconds of one regression and one solve at the shapes of a Llama-3-8B, on random inputs."""
    costs = {}
    for name, (num_in, num_out) in SITES_8B.items():
        x_UD, y_UF = torch.randn(SITE_TOKENS, num_in), torch.randn(SITE_TOKENS, num_out)
        times = [time.process_time()]
        regression = Regression(x_UD, 1e-2)
        times.append(time.process_time())
        regression.solve(y_UF, SITE_RANK)
        times.append(time.process_time())
        costs[name] = {"gram_s": times[1] - times[0], "solve_s": times[2] - times[1]}
    return costs


def _table(found: Sequence[Tried]) -> Table:
    table = Table("task", "variant", "loss", "quality", "CPU s", "KL, own prompts", "KL, others' prompts")
    for t in found:
        figures = f"{t.loss:.3f}", f"{t.quality:.1f}", f"{t.cpu_seconds:.1f}", f"{t.own_kl:.2f}", f"{t.foreign_kl:.2f}"
        table.add_row(t.task, t.variant, *figures)
    return table
