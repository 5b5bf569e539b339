"""The plots of the re-adaptation benchmark: quality against seconds per cell, and the speed-ups."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.readapt.figures import Cell, cells_of
from bench.readapt.records import Arm, Record

COLOURS: dict[Arm, str] = {
    "scratch": "#7f7f7f",
    "copy_ft": "#1f77b4",
    "paper": "#ff7f0e",
    "ours": "#d62728",
    "data_free": "#9467bd",
}
BASELINES: tuple[Arm, ...] = ("scratch", "copy_ft", "paper")
FIRST_SECOND = 0.1  # left end of the logarithmic axis


def plot_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw both plots as PNG files in `folder`; return their paths."""
    cells = cells_of(records)
    folder.mkdir(parents=True, exist_ok=True)
    return [_plot_curves(cells, folder / "curves.png"), _plot_speedups(cells, folder / "speedups.png")]


def _plot_curves(cells: Sequence[Cell], path: Path) -> Path:
    """Draw one field per update (row) and task (column), a line per arm and seed, and a dot at readiness."""
    figure, axes = _grid(cells)
    for cell in cells:
        field = axes[cell.update, cell.task]
        least = max((run.reference for run in cell.runs.values() if run.reference is not None), default=None)
        if least is not None:
            field.axhline(least, color="black", linewidth=0.5, linestyle=":")
        for arm, colour in COLOURS.items():
            if arm in cell.runs:
                _draw(field, cell.runs[arm], colour)
    _finish(figure, list(axes.values()), path)
    return path


def _draw(field: Any, run: Record, colour: str) -> None:
    field.plot(
        [max(p.seconds, FIRST_SECOND) for p in run.curve],
        [p.quality for p in run.curve],
        color=colour,
        linewidth=0.8,
        alpha=0.7,
        label=run.arm,
    )
    if run.ready is not None:
        field.plot([run.ready.seconds], [run.ready.score.gate], "o", color=colour, markersize=4)


def _grid(cells: Sequence[Cell]) -> tuple[Any, dict[tuple[str, str], Any]]:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    updates = list(dict.fromkeys(cell.update for cell in cells))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    size = (2.6 * len(tasks) + 1, 2.2 * len(updates) + 1)
    figure, fields = pyplot.subplots(len(updates), len(tasks), figsize=size, squeeze=False)
    axes = {(u, t): fields[i][j] for i, u in enumerate(updates) for j, t in enumerate(tasks)}
    for (update, task), field in axes.items():
        field.set_title(f"{update}, {task}", fontsize=8)
        field.set_xscale("log")
        field.tick_params(labelsize=6)
    return figure, axes


def _finish(figure: Any, fields: list[Any], path: Path) -> None:
    from matplotlib import pyplot

    labels = {text: line for f in fields for line, text in zip(*f.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="upper right", fontsize=7)
    figure.supxlabel("seconds since base v2 and the v1 adapter were on disk", fontsize=8)
    figure.supylabel("quality on the gate's rows, points", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_speedups(cells: Sequence[Cell], path: Path) -> Path:
    """Draw how many times sooner ready than each baseline, one dot per cell; hollow if a run was censored."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    names = sorted({(cell.update, cell.task) for cell in cells})
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(names) + 1.5))
    for arm in BASELINES:
        for cell in cells:
            if cell.has("ours", arm):
                is_censored = any(cell.runs[a].ready is None for a in ("ours", arm))
                row = names.index((cell.update, cell.task)) + 0.2 * (BASELINES.index(arm) - 1)
                face = "none" if is_censored else COLOURS[arm]
                axes.plot([cell.speedup(arm)], [row], "o", color=COLOURS[arm], markerfacecolor=face, markersize=4)
    for arm in BASELINES:
        axes.plot([], [], "o", color=COLOURS[arm], label=f"ours against {arm}")
    axes.axvline(1.0, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), [f"{update}, {task}" for update, task in names], fontsize=7)
    axes.set_xlabel("times sooner ready (hollow: a run was not ready within its budget)", fontsize=8)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
