"""Hugging Face transformers with PEFT as a server: one adapter at a time, or in mixed batches (`adapter_names`).

The comparison favours PEFT. A batch takes all requests that have arrived for its adapter, or the oldest ones if it is
mixed, up to the limit. Only `generate` is timed. A batch runs to its longest output, and longer outputs are cut.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.serving.served import ServedModel
from bench.serving.workloads import Answer, Ask

BATCH = 32
_PAD = 0
_AS_THE_BASE: dict[str, Any] = {
    "autocast_adapter_dtype": False
}  # else adapters of a half-precision base become float32

Chooser = Callable[[Sequence[Ask]], list[Ask]]


class Peft:
    """The served model with its first `num_adapters` adapters loaded."""

    def __init__(self, served: ServedModel, num_adapters: int):
        model: Any = AutoModelForCausalLM.from_pretrained(served.model, dtype=getattr(torch, served.dtype))
        self.model: Any = model.to(served.device)
        self.model.generation_config.eos_token_id = None  # all requests run to their full length
        self._load(served, num_adapters)

    def replay_by_adapter(self, asks: Sequence[Ask]) -> list[Answer]:
        """Serve one adapter at a time: the oldest request's, with all requests that wait for it."""
        return self._replay(asks, _same_adapter, is_mixed=False)

    def replay_mixed(self, asks: Sequence[Ask]) -> list[Answer]:
        """Serve batches of the oldest requests, each row with its own adapter."""
        return self._replay(asks, lambda waiting: list(waiting[:BATCH]), is_mixed=True)

    def _load(self, served: ServedModel, num_adapters: int) -> None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about tied embeddings once for each adapter
            self.model = PeftModel.from_pretrained(self.model, served.adapters[0], adapter_name="0", **_AS_THE_BASE)
            for number in range(1, num_adapters):
                self.model.load_adapter(served.adapters[number], adapter_name=str(number), **_AS_THE_BASE)
        self.model.eval()

    def _replay(self, asks: Sequence[Ask], choose: Chooser, *, is_mixed: bool) -> list[Answer]:
        answers: dict[int, Answer] = {}
        waiting = list(asks)
        start_s = time.perf_counter()
        while waiting:
            time.sleep(max(waiting[0].arrival_s - (time.perf_counter() - start_s), 0.0))
            now_s = time.perf_counter() - start_s
            chosen = choose([ask for ask in waiting if ask.arrival_s <= now_s])
            rows = self._generate(chosen, is_mixed)
            end_s = time.perf_counter() - start_s
            for ask, row in zip(chosen, rows, strict=True):
                answers[id(ask)] = Answer(None, end_s, tuple(row[: ask.max_tokens]))
            taken = set(map(id, chosen))
            waiting = [ask for ask in waiting if id(ask) not in taken]
        return [answers[id(ask)] for ask in asks]

    @torch.inference_mode()
    def _generate(self, asks: Sequence[Ask], is_mixed: bool) -> list[list[int]]:
        width = max(len(ask.prompt) for ask in asks)
        ids = [[_PAD] * (width - len(ask.prompt)) + list(ask.prompt) for ask in asks]
        mask = [[0] * (width - len(ask.prompt)) + [1] * len(ask.prompt) for ask in asks]
        names = {}
        if is_mixed:
            names = {"adapter_names": ["__base__" if a.adapter is None else str(a.adapter) for a in asks]}
        elif asks[0].adapter is not None:
            self.model.set_adapter(str(asks[0].adapter))
        is_bare = not is_mixed and asks[0].adapter is None
        with self.model.disable_adapter() if is_bare else nullcontext():
            out = self.model.generate(
                input_ids=torch.tensor(ids, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                max_new_tokens=max(ask.max_tokens for ask in asks),
                do_sample=False,
                pad_token_id=_PAD,
                **names,
            )
        rows: list[list[int]] = out[:, width:].tolist()
        return rows


def _same_adapter(waiting: Sequence[Ask]) -> list[Ask]:
    return [ask for ask in waiting if ask.adapter == waiting[0].adapter][:BATCH]
