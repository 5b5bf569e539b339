"""The results of a demo run: qualities on test rows, and a check of every answer with a second implementation."""

from collections.abc import Callable, Sequence

import numpy as np

from cluster.adapters.files import Adapter, load_adapter
from cluster.config.settings import AdapterSpec, Fleet
from cluster.fleet import open_blobs
from cluster.registry.registry import Registry, Status, Version
from demo.load import Answer
from demo.outcome import AdapterOutcome, Curve, Traffic
from demo.scratch import ScratchRun
from demo.verify import terms, wrong_answers
from demo.world import NEW, OLD
from readapt.training.data import encoder_for, load_task
from readapt.training.evaluate import golden, judge
from readapt.training.lora import attached, load_base

TEST_ROWS = 1000  # at most, of each task
MAX_LISTED = 20


class Judge:
    """Judges a finished run. It runs the models with Hugging Face's code, not with the engine that it judges."""

    def __init__(self, fleet: Fleet, registry: Registry, answer_tokens: int):
        self._fleet = fleet
        self._registry = registry
        self._answer_tokens = answer_tokens
        self._blobs = open_blobs(fleet)
        self._models = {base: load_base(fleet.base(base).path) for base in (OLD, NEW)}
        limit = fleet.serving.max_model_tokens
        self._encoders = {base: encoder_for(fleet.base(base).path, limit) for base in (OLD, NEW)}

    def traffic(self, num_sent: int, answers: Sequence[Answer]) -> Traffic:
        """Return how the requests ended. A request without an answer counts as failed."""
        good = [a for a in answers if not a.error]
        failures = [f"{a.adapter}: {a.error}" for a in answers if a.error]
        if num_sent > len(answers):
            failures.append(f"{num_sent - len(answers)} requests got no answer")
        grace_s = 2 * self._fleet.rollout.poll_s
        wrong = wrong_answers(good, terms(self._registry), self._expected, grace_s)
        latencies_ms = [1e3 * a.latency_s for a in good] or [float("nan")]
        return Traffic(
            sent=num_sent,
            failed=num_sent - len(good),
            wrong=len(wrong),
            failures=failures[:MAX_LISTED] + wrong[:MAX_LISTED],
            latency_p50_ms=float(np.percentile(latencies_ms, 50)),
            latency_p99_ms=float(np.percentile(latencies_ms, 99)),
        )

    def adapters(
        self, scratch: dict[str, ScratchRun], submitted_at: float, progress: Callable[[float], None]
    ) -> list[AdapterOutcome]:
        """Return the qualities of each adapter before and after the upgrade, on test rows."""
        outcomes = []
        for index, spec in enumerate(self._fleet.adapters):
            outcomes.append(self._adapter(spec, scratch.get(spec.name), submitted_at))
            progress((index + 1) / len(self._fleet.adapters))
        return outcomes

    def _expected(self, version: Version, prompts: Sequence[str]) -> list[str]:
        model = self._models[version.base]
        with attached(model, self._files(version)):
            pairs = golden(model, self._encoders[version.base], prompts, self._answer_tokens)
        return [pair["completion"] for pair in pairs]

    def _files(self, version: Version) -> Adapter:
        assert version.blob_key is not None, "a version that served has files"
        return load_adapter(self._blobs.fetch_folder(version.blob_key))

    def _adapter(self, spec: AdapterSpec, scratch: ScratchRun | None, submitted_at: float) -> AdapterOutcome:
        version = self._registry.versions(adapter=spec.name, base=NEW)[0]
        details = version.details
        old = load_adapter(self._fleet.local(spec.path))
        is_live = version.status is Status.LIVE
        return AdapterOutcome(
            name=spec.name,
            metric=spec.metric,
            status=str(version.status),
            rung=details.get("rung", ""),
            alpha=details.get("alpha"),
            beta=details.get("beta"),
            quality_v1=self._quality(spec, OLD, old),
            quality_copy=self._quality(spec, NEW, old),
            quality_v2=self._quality(spec, NEW, self._files(version)) if is_live else None,
            ready_s=self._live_at(version) - submitted_at if is_live else None,
            readapt_s=details.get("seconds", {}).get("total"),
            scratch_s=scratch.seconds if scratch else None,
            quality_scratch=self._quality(spec, NEW, scratch.adapter) if scratch else None,
            reference=details.get("reference_quality"),
            curve=self._curve(version),
            scratch_curve=scratch.curve if scratch else [],
        )

    def _quality(self, spec: AdapterSpec, base: str, adapter: Adapter) -> float:
        rows = load_task(spec.data).test[:TEST_ROWS]
        return judge(self._models[base], adapter, self._encoders[base], rows, spec.metric).quality

    def _live_at(self, version: Version) -> float:
        moves = self._registry.events(version_id=version.id, kind="moved")
        return next(event.at for event in moves if event.details["target"] == Status.LIVE)

    def _curve(self, version: Version) -> Curve:
        rungs = self._registry.events(version_id=version.id, kind="rung")
        return [(event.details["seconds"], event.details["quality"]) for event in rungs]
