"""The plots of the serving benchmark: speed by number of adapters, and by load."""

from pathlib import Path
from typing import Any

_OURS, _PEFT = "#d62728", "#1f77b4"


def plot_all(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw both plots as PNG files in `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _plot_adapters(report["adapters"], folder / "serving-adapters.png"),
        _plot_load(report["trace"], folder / "serving-load.png"),
    ]


def _plot_adapters(found: dict[str, Any], path: Path) -> Path:
    figure, (left, right) = _pair()
    counts = sorted(map(int, found))
    few = [count for count in counts if "same requests" in found[str(count)]]
    for axes, key, name in ((left, "tokens_per_s", "tokens a second"), (right, "latency_mean_s", "mean latency, s")):
        axes.plot(counts, [found[str(n)]["ours"][key] for n in counts], "o-", color=_OURS, label="ours")
        for engine, colour, label in (
            ("ours", _OURS, "ours, PEFT's requests"),
            ("peft one adapter at a time", _PEFT, "PEFT, one adapter at a time"),
        ):
            values = [found[str(n)]["same requests"][engine][key] for n in few]
            axes.plot(few, values, "s--", color=colour, label=label, markerfacecolor="none")
        axes.set(xscale="log", xlabel="adapters", ylabel=name, ylim=(0, None))
    left.legend(fontsize=7)
    return _save(figure, path)


def _plot_load(found: dict[str, Any], path: Path) -> Path:
    figure, (left, right) = _pair()
    runs = list(found["loads"].values())
    offered = [run["offered_requests_per_s"] for run in runs]
    left.plot(offered, [run["requests_per_s"] for run in runs], "o-", color=_OURS)
    left.plot(offered, offered, color="black", linewidth=0.5, linestyle=":")
    left.set(xlabel="offered requests a second", ylabel="answered requests a second")
    for key, style, label in (
        ("first_token_p50_s", "o-", "first token, p50"),
        ("first_token_p99_s", "o--", "first token, p99"),
        ("latency_mean_s", "s-", "whole answer, mean"),
    ):
        right.plot(offered, [run[key] for run in runs], style, label=label)
    right.set(xlabel="offered requests a second", ylabel="seconds", yscale="log")
    right.legend(fontsize=7)
    return _save(figure, path)


def _pair() -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, 2, figsize=(9, 3.4))


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
