"""Processes that inherit a marked environment: find all of them, and end them."""

import signal
from collections.abc import Callable

import psutil


def marked_processes(variable: str, value: str) -> list[psutil.Process]:
    """Return the living processes that have this value of an environment variable, and all their children.

    The children are listed too because a process that sets its title overwrites its environment.
    """
    marked = [process for process in psutil.process_iter() if _environment_of(process).get(variable) == value]
    return list({*marked, *(child for process in marked for child in _children_of(process))})


def end_all(find: Callable[[], list[psutil.Process]], grace_s: float) -> None:
    """End the processes that `find` returns; kill those still alive after `grace_s`."""
    known = set(find())  # once a parent has ended, its children cannot be recognised any more
    for sent in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):  # twice, for processes that were just starting
        known.update(find())
        _send([process for process in known if process.is_running()], sent, grace_s)


def _send(processes: list[psutil.Process], sent: signal.Signals, grace_s: float) -> None:
    for process in processes:
        try:
            process.send_signal(sent)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=grace_s)


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):  # it has ended, or belongs to another user
        return {}


def _children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
