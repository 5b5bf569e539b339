"""Worker processes for timings: one thread each, each pinned to its own core."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import Queue
from typing import Any

import psutil
import torch
from transformers.utils import logging

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def free_cores(jobs: int | None) -> list[int]:
    """Return cores for `jobs` workers (None: one per physical core) among those that this process may use."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    wanted = jobs or min(psutil.cpu_count(logical=False) or 1, len(allowed))
    return allowed[:wanted]


def run_on(cores: Sequence[int], calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
    """Run the calls in order, each in the next free worker; yield (index of the call, result) as they finish.

    If some fail, the first error is raised once all are done.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    free: Queue[int] = context.Queue()
    for core in cores:
        free.put(core)
    errors = []
    with ProcessPoolExecutor(len(cores), mp_context=context, initializer=_set_up, initargs=(free,)) as pool:
        futures = {pool.submit(function, *arguments): index for index, (function, arguments) in enumerate(calls)}
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                yield futures[future], future.result()
            else:
                errors.append(error)
    if errors:
        raise errors[0]


def _set_up(free: "Queue[int]") -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    core = free.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _end_with_parent() -> None:
    """End this worker when the benchmark dies. Otherwise it would write records beside those of the next benchmark."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
