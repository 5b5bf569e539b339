"""The report of an extraction: `extraction.json` has every figure, `spectrum.png` the curves."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from readapt.extraction.files import REMAINDER, WEIGHTS, Extraction, Part, Status

REPORT, PLOT = "extraction.json", "spectrum.png"
_MAX_CURVES = 400  # more lines than this fill the plot


def report_of(done: Extraction, base: Path, tuned: Path) -> dict[str, Any]:
    """Return every figure of an extraction, ready for JSON.

    `energy` is the share of a module's squared Frobenius norm that the adapter holds. `relative_norm` is
    |change| / |base weight|. `gap_bound` is an upper bound on the share of the best possible energy at this rank that
    the randomised SVD missed. It always holds, and it is loose for flat spectra.
    """
    carried = [part for part in done.parts if part.status is Status.CARRIED]
    remainder = done.folder / REMAINDER
    return {
        "base": str(base),
        "tuned": str(tuned),
        "architecture": done.anatomy.architecture or None,
        "max_rank": done.max_rank,
        "adapters": [_adapter(label, done, carried) for label in done.adapters],
        "modules": [_module(part, done) for part in carried],
        "num_equal": sum(part.status is Status.EQUAL for part in done.parts),
        "remainder": {
            "bytes": remainder.stat().st_size if remainder.exists() else 0,
            "tensors": [part.path for part in done.parts if part.status is Status.REMAINDER and not part.num_new_rows],
            "new_rows": {part.path: part.num_new_rows for part in done.parts if part.num_new_rows},
            "cut_rows": {part.path: part.num_cut_rows for part in done.parts if part.num_cut_rows},
        },
        "not_carried": {part.path: part.reason for part in done.parts if part.status is Status.LEFT_OUT},
        "seconds": sum(part.seconds for part in done.parts),
    }


def write_report(done: Extraction, report: Mapping[str, Any]) -> None:
    """Write both files of the report into the extraction's folder, replacing older ones."""
    aside = done.folder / f".{REPORT}"
    aside.write_text(json.dumps(report, indent=1) + "\n")
    aside.rename(done.folder / REPORT)
    _plot(done.folder / PLOT, [part for part in done.parts if part.status is Status.CARRIED], report.get("verify"))


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of a finished extraction."""
    return dict(json.loads((folder / REPORT).read_text()))


def adapters_table(report: Mapping[str, Any]) -> Table:
    """Return a table with one row per adapter. Its caption lists what is not in the adapters."""
    likeness = report.get("verify", {}).get("adapters", {})
    table = Table("adapter", "ranks", "parameters", "MB", "energy", *(("KL", "same top-1") if likeness else ()))
    for adapter in report["adapters"]:
        ranks = f"{adapter['rank_min']}..{adapter['rank_max']}"
        cells = [adapter["rule"], ranks, f"{adapter['parameters']:,}", f"{adapter['bytes'] / 1e6:.1f}"]
        found = likeness.get(adapter["rule"])
        extra = [f"{found['kl']:.4f}", f"{100 * found['top1_agreement']:.1f} %"] if found else []
        table.add_row(*cells, f"{100 * adapter['energy']:.1f} %", *extra)
    table.caption = _not_inside(report)
    return table


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """Return what a person should know before serving the adapters: capped ranks and adapters that are too large."""
    warnings = []
    for adapter in report["adapters"]:
        if adapter["num_capped"]:
            warnings.append(
                f"{adapter['rule']}: {adapter['num_capped']} modules are cut to rank {report['max_rank']}. `--max-rank`"
                " raises this cap; an engine serves no rank above its serving.max_rank (128 by default)."
            )
        if adapter["parameters"] > adapter["replaced_parameters"]:
            warnings.append(
                f"{adapter['rule']}: the adapter has {adapter['parameters']:,} parameters, more than the "
                f"{adapter['replaced_parameters']:,} of the tensors that it changes. Choose a lower rank, or serve the "
                "tuned model itself."
            )
    return warnings


def _not_inside(report: Mapping[str, Any]) -> str:
    remainder, left_out = report["remainder"], report["not_carried"]
    cut = remainder["cut_rows"]
    num_whole = len(remainder["tensors"]) + len(remainder["new_rows"])
    lines = [f"{REMAINDER} holds {num_whole} more changed tensors"] if num_whole else []
    lines += [f"{name}: the last {num} rows of the base are not in the tuned model" for name, num in cut.items()]
    lines += [f"not carried: {name} ({reason})" for name, reason in left_out.items()]
    return "\n".join(lines)


def _adapter(label: str, done: Extraction, carried: Sequence[Part]) -> dict[str, Any]:
    ranks = [done.ranks[label].get(part.path, 0) for part in carried]
    spectra = [part.spectrum for part in carried if part.spectrum is not None]
    held = sum(s.energy(rank) * s.total for s, rank in zip(spectra, ranks, strict=True))
    return {
        "rule": label,
        "folder": str(done.adapters[label].relative_to(done.folder)),
        "parameters": sum(s.cost * rank for s, rank in zip(spectra, ranks, strict=True)),
        "replaced_parameters": sum(math.prod(p.shape) for p, rank in zip(carried, ranks, strict=True) if rank),
        "num_capped": done.num_capped.get(label, 0),
        "bytes": (done.adapters[label] / WEIGHTS).stat().st_size,
        "energy": held / sum(s.total for s in spectra),
        "rank_min": min(ranks),
        "rank_median": statistics.median(ranks),
        "rank_max": max(ranks),
    }


def _module(part: Part, done: Extraction) -> dict[str, Any]:
    spectrum = part.spectrum
    assert spectrum is not None, "a carried tensor has a spectrum"
    ranks = {label: chosen.get(part.path, 0) for label, chosen in done.ranks.items()}
    return {
        "tensor": part.path,
        "modules": [place.module for place in part.places],
        "kind": part.places[0].kind,
        "shape": part.shape,
        "relative_norm": (spectrum.total / part.base_total) ** 0.5 if part.base_total else None,
        "rank": ranks,
        "energy": {label: spectrum.energy(rank) for label, rank in ranks.items()},
        "is_exact": part.is_exact,
        "gap_bound": part.gap_bound,
        "seconds": part.seconds,
        "singular_values": spectrum.values,
    }


def _plot(file: Path, carried: Sequence[Part], verify: Mapping[str, Any] | None) -> None:
    """Plot singular values and held energy by rank and, if there is a verification, likeness by rank."""
    if find_spec("matplotlib") is None:  # optional: `relora extract` says that there is no plot
        return
    from matplotlib.figure import Figure  # pyplot keeps global state and needs a display

    figure = Figure(figsize=(15 if verify else 10, 4), layout="constrained")
    axes = figure.subplots(1, 3 if verify else 2)
    for part in carried[:: len(carried) // _MAX_CURVES + 1]:
        _plot_spectrum(axes, part)
    axes[0].set(title="singular values, relative to the largest", xlabel="rank", xscale="log", yscale="log")
    axes[1].set(title="energy held", xlabel="rank", xscale="log", ylim=(0, 1.02))
    if verify:
        _plot_curve(axes[2], verify)
    figure.savefig(file, dpi=120)


def _plot_spectrum(axes: Any, part: Part) -> None:
    assert part.spectrum is not None, "a carried tensor has a spectrum"
    values = [value for value in part.spectrum.values if value > 0.0]
    ranks = range(1, len(values) + 1)
    held, energies = 0.0, []
    for value in values:
        held += value * value
        energies.append(min(held / part.spectrum.total, 1.0))
    axes[0].plot(ranks, [value / values[0] for value in values], linewidth=0.7, alpha=0.6)
    axes[1].plot(ranks, energies, linewidth=0.7, alpha=0.6)


def _plot_curve(axis: Any, verify: Mapping[str, Any]) -> None:
    curve = verify["curve"]
    ranks = [point["max_rank"] for point in curve]
    axis.plot(ranks, [point["kl"] for point in curve], "o-", color="tab:red")
    axis.set(title="base + truncated adapter against tuned", xlabel="largest rank", xscale="log", yscale="log")
    axis.set_ylabel("mean KL of next-token distributions, nats", color="tab:red")
    right = axis.twinx()
    right.plot(ranks, [100 * point["top1_agreement"] for point in curve], "s-", color="tab:blue")
    right.set_ylabel("same first choice, %", color="tab:blue")
