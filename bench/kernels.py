"""Time the kernels against their twins: `relora bench kernels [--device cuda] [--out FILE.json]`.

Each case is first compared with the twin and raises an error if the results differ. Times are medians. `base_us` is the
time of the base model's product x @ W beside which the LoRA operations run; other operations have none. Adapters and
pages are scattered over a larger arena and change with each repetition, so that caches do not flatter the results.
`--no-compiled` times torch instead of the compiled CPU kernels.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.facts import facts, write_report
from kernels import reference
from kernels.attention import AttentionMetadata
from kernels.ops import Ops, ops_for
from kernels.segments import LoraGroup, LoraSegments

Dtype = Literal["float32", "float16", "bfloat16"]
NUM_COPIES = 4  # distinct inputs, which the repetitions use in turn


@dataclass(frozen=True)
class Result:
    """One case: median microseconds per call of the twin, of our kernel, and of the base model's product."""

    name: str
    twin_us: float
    ours_us: float
    base_us: float | None


def run(device: str, dtype: Dtype, is_compiled: bool, repeats: int, out: Path | None, console: Console) -> None:
    """Run all cases, print the table, and write the JSON file if `out` is given."""
    results = measure(ops_for(device, is_compiled=is_compiled), device, getattr(torch, dtype), repeats)
    title = f"{device} {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(_table(results, title))
    if out is not None:
        how = facts(("torch",), device) | {"dtype": dtype, "is_compiled": is_compiled, "repeats": repeats}
        write_report(out, {"facts": how, "results": [asdict(result) for result in results]})


def measure(ops: Ops, device: str, dtype: torch.dtype, repeats: int) -> list[Result]:
    """Run all cases on one device."""
    torch.manual_seed(0)
    timer = _Timer(ops, device, dtype, repeats)
    lora = [
        timer.lora(num_tokens, num_adapters, width)
        for width in (192, 2048)
        for num_tokens, num_adapters in ((32, 1), (32, 4), (32, 32), (512, 8))
    ]
    lora += [timer.lora(32, num_adapters, 192, num_modules=3) for num_adapters in (1, 4, 32)]
    attention = [
        timer.attention([1] * 32, [256] * 32),
        timer.attention([1] * 32, [32] * 31 + [2000]),
        timer.attention([256, 1, 1], [256] * 3),
        timer.attention([256], [2000]),
    ]
    rows = [timer.norm(num_tokens) for num_tokens in (8, 256)]
    rows += [timer.rotate(num_tokens) for num_tokens in (8, 256)]
    rows += [timer.gate(num_tokens) for num_tokens in (8, 256)]
    return [*lora, *attention, timer.store(), *rows]


@dataclass(frozen=True)
class _Timer:
    ops: Ops
    device: str
    dtype: torch.dtype
    repeats: int

    def lora(self, num_tokens: int, num_adapters: int, width: int, num_modules: int = 1) -> Result:
        """Time shrink and expand of modules with one input, D = F = width. Ranks alternate between 16 and 8."""
        x_TD, weight_DF = self._randn(num_tokens, width), self._randn(width, num_modules * width)
        out_TF = x_TD @ weight_DF
        copies = [self._adapters(num_tokens, num_adapters, width, num_modules) for _ in range(NUM_COPIES)]

        def both(ops: Ops, copy: tuple[Tensor, LoraGroup]) -> Tensor:
            out_TF.zero_()
            ops.lora_expand(ops.lora_shrink(x_TD, *copy), *copy, out_TF)
            return out_TF

        base_us = _median_us(lambda _: x_TD @ weight_DF, copies, self.repeats)
        name = f"lora T={num_tokens} S={num_adapters} D=F={width}" + (f" x{num_modules}" if num_modules > 1 else "")
        return Result(name, *self._compare(both, copies), base_us)

    def attention(self, query_lens: list[int], context_lens: list[int]) -> Result:
        """Time attention of 8 query and 4 key/value heads of size 64; pages of 16 tokens in random order."""
        num_blocks = -(-max(context_lens) // 16)
        kv_pages = self._randn(len(context_lens) * num_blocks, 2, 2, 16, 4, 64)
        q_TNH = self._randn(sum(query_lens), 8, 64)
        starts = self._int32([sum(query_lens[:b]) for b in range(len(query_lens) + 1)])
        lens = self._int32(context_lens)
        orders = [torch.randperm(len(kv_pages)).tolist() for _ in range(NUM_COPIES)]
        tables = [self._int32(order).view(len(lens), num_blocks) for order in orders]
        copies = [AttentionMetadata(starts, lens, table, max(query_lens), max(context_lens)) for table in tables]

        def attend(ops: Ops, metadata: AttentionMetadata) -> Tensor:
            return ops.paged_attention(q_TNH, kv_pages, 1, metadata, scale=0.125, window=None)

        name = f"attention B={len(lens)} query<={max(query_lens)} context={min(context_lens)}..{max(context_lens)}"
        return Result(name, *self._compare(attend, copies), None)

    def store(self) -> Result:
        """Time storing one step's keys and values of 32 decoding sequences."""
        k_TKH, v_TKH = self._randn(2, 32, 4, 64)
        kv_pages = self._randn(64, 2, 2, 16, 4, 64)
        slots = [torch.randperm(64 * 16)[:32].to(self.device) for _ in range(NUM_COPIES)]

        def store(ops: Ops, slots_T: Tensor) -> Tensor:
            ops.store_kv(k_TKH, v_TKH, kv_pages, 1, slots_T)
            return kv_pages

        return Result("store_kv T=32", *self._compare(store, slots), None)

    def norm(self, num_tokens: int) -> Result:
        """Time RMSNorm of 768 numbers per token."""
        xs, weight_D = [self._randn(num_tokens, 768) for _ in range(NUM_COPIES)], self._randn(768)
        return Result(
            f"rms_norm T={num_tokens}", *self._compare(lambda ops, x: ops.rms_norm(x, weight_D, 1e-5), xs), None
        )

    def rotate(self, num_tokens: int) -> Result:
        """Time the rotation of 12 query and 4 key heads of size 64."""
        xs = [self._randn(num_tokens, 16, 64) for _ in range(NUM_COPIES)]
        cos_TJ = sin_TJ = torch.full((num_tokens, 32), 0.5**0.5, device=self.device, dtype=self.dtype)

        def rotate(ops: Ops, x_TNH: Tensor) -> Tensor:
            ops.rotate(x_TNH, cos_TJ, sin_TJ)
            return x_TNH

        return Result(f"rotate T={num_tokens}", *self._compare(rotate, xs), None)

    def gate(self, num_tokens: int) -> Result:
        """Time a gated unit of width 2048."""
        xs = [self._randn(num_tokens, 4096) for _ in range(NUM_COPIES)]
        return Result(f"silu_mul T={num_tokens}", *self._compare(lambda ops, x: ops.silu_mul(x), xs), None)

    def _adapters(self, num_tokens: int, num_adapters: int, width: int, num_modules: int) -> tuple[Tensor, LoraGroup]:
        ranks = [8 if s % 2 else 16 for s in range(num_adapters)]
        num_rows = 2 * sum(ranks)
        rows = torch.randperm(2 * num_rows * num_modules)[: num_rows * num_modules] * width
        modules = [
            LoraSegments(
                token_starts=self._int32([num_tokens * s // num_adapters for s in range(num_adapters + 1)]),
                ranks=self._int32(ranks),
                scalings=torch.full((num_adapters,), 2.0, device=self.device),
                table_starts=self._int32([sum(ranks[:s]) for s in range(num_adapters)]).long(),
                a_rows=own[: num_rows // 2],
                b_rows=own[num_rows // 2 :],
                max_rank=max(ranks),
                max_tokens=-(-num_tokens // num_adapters),
            )
            for own in rows.to(self.device).split(num_rows)
        ]
        arena = self._randn(2 * num_rows * num_modules * width) * width**-0.5
        return arena, LoraGroup.of(modules, [width] * num_modules)

    def _compare(self, function: Callable[[Ops, Any], Tensor], copies: list[Any]) -> tuple[float, float]:
        for copy in copies:
            if isinstance(copy, Tensor):  # some operations work in place
                expected, actual = function(reference, copy.clone()), function(self.ops, copy.clone())
            else:
                expected, actual = function(reference, copy).clone(), function(self.ops, copy)
            tolerance = 1e-4 if self.dtype == torch.float32 else 3e-2
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        twin_us = _median_us(lambda copy: function(reference, copy), copies, max(3, self.repeats // 10))
        return twin_us, _median_us(lambda copy: function(self.ops, copy), copies, self.repeats)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)

    def _int32(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)


def _median_us(function: Callable[[Any], object], copies: list[Any], repeats: int) -> float:
    times_s = []
    for i in range(repeats):
        _synchronize()
        start_s = time.perf_counter()
        function(copies[i % len(copies)])
        _synchronize()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s) * 1e6


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _table(results: list[Result], title: str) -> Table:
    table = Table("case", "twin us", "ours us", "times faster", "base x@W us", title=title)
    for result in results:
        base = "" if result.base_us is None else f"{result.base_us:.0f}"
        ratio = f"{result.twin_us / result.ours_us:.1f}"
        table.add_row(result.name, f"{result.twin_us:.0f}", f"{result.ours_us:.0f}", ratio, base)
    return table
