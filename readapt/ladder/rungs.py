"""Which rungs a ladder tries, and in which order: those configured, less those that are pointless for these bases."""

from collections.abc import Sequence

from cluster.config.readapt import LadderConfig

REUSING = frozenset({"copy", "transplant", "fused", "train"})  # the rungs that use the old adapter


def rungs_for(config: LadderConfig, cosine: float) -> Sequence[str]:
    """Return the configured rungs for two bases whose weights have that cosine, in the order to try them.

    Unrelated bases get "scratch" alone, if it is configured. If the bases have moved apart, the transplant comes before
    the copy, which would seldom pass.
    """
    if "scratch" in config.rungs and cosine < config.min_cosine:
        return ("scratch",)
    return config.rungs if cosine >= config.copy_cosine else _transplant_first(config.rungs)


def _transplant_first(rungs: Sequence[str]) -> Sequence[str]:
    """Move a copy that comes before the transplant to directly behind it."""
    if "transplant" not in rungs or "copy" not in rungs[: rungs.index("transplant")]:
        return rungs
    others = [rung for rung in rungs if rung != "copy"]
    others.insert(others.index("transplant") + 1, "copy")
    return others
