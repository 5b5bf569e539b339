"""The table for the terminal, and `report.html` with its three pictures."""

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from demo.load import Answer
from demo.outcome import AdapterOutcome, Outcome

COLUMNS = (
    "adapter",
    "metric",
    "on v1",
    "copy on v2",
    "rung",
    "alpha / beta",
    "on v2",
    "live after",
    "own work",
    "scratch to same gate",
)


def rows(outcome: Outcome) -> list[list[str]]:
    """Return the table's cells, one row per adapter."""
    return [_row(adapter) for adapter in outcome.adapters]


def table(outcome: Outcome) -> Table:
    """Return the table for the terminal."""
    result = Table(title="Qualities are points on test rows that search and gate have not seen")
    for index, name in enumerate(COLUMNS):
        result.add_column(name, justify="left" if index in (0, 1, 4) else "right", no_wrap=index == 0)
    for adapter, cells in zip(outcome.adapters, rows(outcome), strict=True):
        result.add_row(*cells, style=None if adapter.is_restored else "red")
    return result


def summary(outcome: Outcome) -> list[str]:
    """Return the results of the run as sentences."""
    adapters = outcome.adapters
    traffic = outcome.traffic
    fallen = sum(a.quality_copy < a.quality_v1 - 1.0 for a in adapters)
    drop = float(np.mean([a.quality_v1 - a.quality_copy for a in adapters]))
    restored = sum(a.is_restored for a in adapters)
    return [
        f"A plain copy fails on v2 for {fallen} of {len(adapters)} adapters (mean drop {drop:.1f} points).",
        f"{restored} of {len(adapters)} adapters are back within 1 point of their v1 quality (or scratch's, if lower).",
        f"{traffic.sent} requests were sent during the run: {traffic.failed} failed, {traffic.wrong} were answered by "
        f"a wrong version; latency p50 {traffic.latency_p50_ms:.0f} ms, p99 {traffic.latency_p99_ms:.0f} ms.",
        f"The upgrade took {outcome.upgrade_s:.0f} s, the whole run {outcome.total_s:.0f} s, on {outcome.hardware}.",
    ]


def write_html(outcome: Outcome, path: Path) -> None:
    """Write the report as one file that contains its pictures."""
    template = jinja2.Template((Path(__file__).parent / "report.html.j2").read_text(), autoescape=True)
    pictures = {
        "Quality against time, each adapter": _picture(_draw_quality, outcome),
        "Share of traffic by version": _picture(_draw_share, outcome),
        "Request latency": _picture(_draw_latency, outcome),
    }
    path.write_text(
        template.render(
            columns=COLUMNS, rows=rows(outcome), summary=summary(outcome), pictures=pictures, outcome=outcome
        )
    )


def _row(a: AdapterOutcome) -> list[str]:
    fusion = "" if a.alpha is None or a.beta is None else f"{a.alpha:.2f} / {a.beta:+.2f}"
    return [
        a.name,
        a.metric,
        f"{a.quality_v1:.1f}",
        f"{a.quality_copy:.1f}",
        a.rung if a.status == "live" else f"{a.rung} {a.status}".strip(),
        fusion,
        _number(a.quality_v2),
        _number(a.ready_s, " s"),
        _number(a.readapt_s, " s"),
        _number(a.scratch_s, " s", absent="not reached"),
    ]


def _number(value: float | None, unit: str = "", absent: str = "-") -> str:
    return absent if value is None else f"{value:.1f}{unit}"


def _picture(draw: Callable[[Outcome], Figure], outcome: Outcome) -> str:
    buffer = io.BytesIO()
    figure = draw(outcome)
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_quality(outcome: Outcome) -> Figure:
    count = max(1, len(outcome.adapters))
    num_columns = min(3, count)
    num_rows = -(-count // num_columns)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(4 * num_columns, 2.6 * num_rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis, adapter in zip(axes.flat, outcome.adapters, strict=False):
        if adapter.reference is not None:
            axis.axhline(adapter.reference, color="grey", linestyle=":", label="v1 specialist")
        _line(axis, adapter.curve, "tab:green", "ReLoRA")
        _line(axis, adapter.scratch_curve, "tab:red", "scratch")
        axis.set(title=adapter.name, ylim=(-3, 103), xlabel="seconds of work", ylabel="points (gate rows)")
    axes.flat[0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    return figure


def _line(axis: plt.Axes, curve: Sequence[tuple[float, float]], color: str, label: str) -> None:
    if curve:
        axis.plot(*zip(*curve, strict=True), color=color, marker=".", label=label)


def _draw_share(outcome: Outcome) -> Figure:
    bins = _bins(outcome)
    bases = sorted({a.base for a in outcome.answers if a.base})
    share = [[100.0 * sum(a.base == base for a in group) / len(group) for group in bins.values()] for base in bases]
    figure, axis = plt.subplots(figsize=(8, 2.8))
    if bases:
        axis.stackplot(list(bins), share, labels=bases, alpha=0.8)
        axis.legend(loc="center right")
    axis.set(xlabel="seconds since the upgrade was submitted", ylabel="% of answers", ylim=(0, 100))
    return figure


def _draw_latency(outcome: Outcome) -> Figure:
    bins = _bins(outcome)
    figure, axis = plt.subplots(figsize=(8, 2.8))
    for percent in (50, 95, 99):
        values = [1e3 * np.percentile([a.latency_s for a in group], percent) for group in bins.values()]
        axis.plot(list(bins), values, label=f"p{percent}")
    axis.set(xlabel="seconds since the upgrade was submitted", ylabel="latency, ms", yscale="log")
    axis.legend()
    return figure


def _bins(outcome: Outcome, num_bins: int = 60) -> dict[float, list[Answer]]:
    """Return the answers by time: the middle of a bin in seconds since the upgrade. Empty bins are left out."""
    answered = [a for a in outcome.answers if a.base]
    if not answered:
        return {}
    start = min(a.done_at for a in answered)
    end = max(a.done_at for a in answered)
    width_s = max((end - start) / min(num_bins, len(answered)), 1e-3)
    bins: dict[float, list[Answer]] = defaultdict(list)
    for answer in sorted(answered, key=lambda a: a.done_at):
        index = min(int((answer.done_at - start) / width_s), num_bins - 1)
        bins[start + (index + 0.5) * width_s - outcome.started_at].append(answer)
    return bins
