"""The resources that a campaign's processes need on a cluster."""

from collections.abc import Mapping

from cluster.config.readapt import ReadaptConfig
from cluster.errors import ConfigError

TRIAL_CPUS = 0.5  # per search process; trials are short and share the cores with the workers


def check_room(config: ReadaptConfig, cluster: Mapping[str, float]) -> None:
    """Raise ConfigError if a cluster with these resources can never hold all workers and a search beside them.

    Both would wait forever: workers hold their resources until all jobs are done, and a job may need the search.
    """
    workers = config.workers
    num_searches = int("fused" in config.ladder.rungs)
    needs = {
        "CPU": workers.num_workers * workers.cpus_per_worker + num_searches * TRIAL_CPUS,
        "GPU": (workers.num_workers + num_searches) * workers.gpus_per_worker,
    }
    for resource, needed in needs.items():
        if round(needed - cluster.get(resource, 0.0), 4) > 0:  # Ray counts in ten-thousandths
            beside = " and the search of the fused rung" if num_searches else ""
            raise ConfigError(
                f"[readapt.workers]: the workers{beside} need {needed:g} {resource}s, "
                f"the cluster has {cluster.get(resource, 0.0):g}."
            )
