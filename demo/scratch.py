"""The control: training each adapter on v2 from scratch to the same gate, on the same machine in the same run."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from cluster.adapters.files import Adapter, load_adapter
from cluster.config.settings import AdapterSpec, Fleet
from demo.outcome import Curve
from demo.specialists import single_threaded
from readapt.fusion.search import split_valid
from readapt.ladder.runs import train_scratch
from readapt.training.data import encoder_for, load_task
from readapt.training.evaluate import Evaluator, Gate, Watcher
from readapt.training.lora import load_base


@dataclass(frozen=True)
class ScratchRun:
    """The result of scratch training: `seconds` until it passed the gate (None: it never did) and its best adapter."""

    name: str
    seconds: float | None
    adapter: Adapter
    curve: Curve


def scratch_runs(fleet: Fleet, target: str, references: dict[str, float]) -> Iterator[ScratchRun]:
    """Train every adapter of `references` (name to the gate's reference). Yield each as it ends.

    As many run at once as the campaign has workers, with one thread each, so that the seconds are comparable.
    """
    specs = [spec for spec in fleet.adapters if spec.name in references]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(fleet.readapt.workers.num_workers, mp_context=spawn) as pool:
        runs = [pool.submit(_train, fleet, target, spec, references[spec.name]) for spec in specs]
        for run in as_completed(runs):
            yield run.result()


def _train(fleet: Fleet, target: str, spec: AdapterSpec, reference: float) -> ScratchRun:
    with single_threaded():
        return _train_alone(fleet, target, spec, reference)


def _train_alone(fleet: Fleet, target: str, spec: AdapterSpec, reference: float) -> ScratchRun:
    config = fleet.readapt
    base = fleet.base(target).path
    model = load_base(base)
    encoder = encoder_for(base, config.train.max_tokens)
    task = load_task(spec.data)
    gate = Gate(reference, config.gate.tolerance_points)
    result = train_scratch(
        model,
        encoder,
        task.train,
        load_adapter(fleet.local(spec.path)),
        config.train,
        evaluate=Evaluator(model, encoder, split_valid(task.valid, config.search)[1], spec.metric),
        watch=Watcher(gate),
    )
    curve = [(point.seconds, point.quality) for point in result.curve]
    return ScratchRun(spec.name, curve[-1][0] if result.is_ready else None, result.best, curve)
