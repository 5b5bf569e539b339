"""The Triton kernels against the twins in Triton's interpreter, and each variant compiled for sm_90; no GPU needed.

Triton decides at its first import whether it interprets. So interpreter and compiler each run in their own process, and
this process never imports triton.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest
import torch

from kernels import reference
from tests.worlds.kernels import (
    assert_close,
    attention_case,
    dense_lora,
    guarded,
    guards_intact,
    lookup_case,
    lora_case,
    run_lora,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def _start(is_interpreted: bool) -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = str(int(is_interpreted))
    torch.set_num_threads(1)


def _process(is_interpreted: bool) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(is_interpreted,)) as executor:
        yield executor


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    yield from _process(True)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Executor]:
    yield from _process(False)


def _guard_allocations(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Put the launchers' tensors between guard zones and fill empty ones with NaN. Returns the allocations."""
    allocations: list[torch.Tensor] = []

    def allocate(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        inner, whole = guarded(shape, dtype, str(device))
        allocations.append(whole)
        return inner

    monkeypatch.setattr(torch, "empty", lambda shape, **options: allocate(*shape, **options))
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: allocate(*shape, **options).zero_())
    return allocations


def _check_lora(popularity: str, dtype: torch.dtype, **options: object) -> None:
    from kernels import triton_lora

    case = lora_case(popularity=popularity, dtype=dtype, **options)
    expected_h = reference.lora_shrink(case.x_TD, case.arena, case.group)
    with pytest.MonkeyPatch.context() as monkeypatch:
        allocations = _guard_allocations(monkeypatch)
        actual_h = triton_lora.lora_shrink(case.x_TD, case.arena, case.group)
    torch.testing.assert_close(actual_h, expected_h, rtol=1e-5, atol=2e-5)
    assert [guards_intact(whole) for whole in allocations] == [True]
    wide, whole = guarded((case.base_TF.shape[0], case.base_TF.shape[1] + 5), dtype)
    out_TF = wide[:, 3:-2]
    out_TF.copy_(case.base_TF)
    run_lora(triton_lora, case, out_TF)
    expected_TF = dense_lora(case)
    scale = max(1.0, expected_TF.abs().max().item())
    assert_close(out_TF / scale, expected_TF / scale)
    assert guards_intact(whole)
    assert wide[:, :3].isnan().all()
    assert wide[:, -2:].isnan().all()


def _check_lookup(dtype: torch.dtype, **options: object) -> None:
    from kernels import triton_lora

    case = lookup_case(dtype=dtype, **options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        allocations = _guard_allocations(monkeypatch)
        actual = triton_lora.lora_lookup(case.ids_T, case.arena, case.module, case.width)
    assert torch.equal(actual, case.expected_TR)
    assert [guards_intact(whole) for whole in allocations] == [True]


@DTYPES
@pytest.mark.parametrize("ranks", [[3, 0, 8], [70]], ids=["mixed", "tiles"])
def test_lookup_equals_whole_rows(interpreter: Executor, ranks: list[int], dtype: torch.dtype):
    options = {"ranks": ranks, "num_tokens": 37, "num_plain": 1, "width": 7, "seed": 5}
    interpreter.submit(_check_lookup, dtype, **options).result()


@DTYPES
@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_lora_equals_the_twin(interpreter: Executor, popularity: str, dtype: torch.dtype):
    options = {"num_tokens": 7, "num_plain": 1, "ranks": [3, 0, 16], "num_in": 37, "widths": (45, 5), "seed": 11}
    interpreter.submit(_check_lora, popularity, dtype, **options).result()


@pytest.mark.parametrize("widths", [(40,), (130, 5, 5)], ids=["one", "three"])
@DTYPES
def test_dora_among_others(interpreter: Executor, dtype: torch.dtype, widths: tuple[int, ...]):
    options = {"num_tokens": 9, "num_plain": 1, "ranks": [3, 0, 16], "widths": widths, "has_dora": True, "seed": 12}
    interpreter.submit(_check_lora, "distinct", dtype, **options).result()


@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 40, "ranks": [70, 5]},  # several tiles of tokens and ranks (shrink), several steps (expand)
        {"num_tokens": 3, "ranks": [1, 64], "num_in": 150, "widths": (1,)},  # several steps over D
        {"num_tokens": 2, "ranks": [2], "num_in": 1, "widths": (130,)},  # several tiles of F
    ],
    ids=["tiles", "wide-in", "wide-out"],
)
def test_lora_of_several_tiles(interpreter: Executor, options: dict[str, object]):
    interpreter.submit(_check_lora, "uniform", torch.float32, **options).result()


def _check_bfloat16_through_upcast() -> None:
    from kernels import triton_lora

    case = lora_case(num_tokens=6, ranks=[3, 9], dtype=torch.bfloat16, seed=2)
    actual_h = triton_lora.lora_shrink(case.x_TD, case.arena, case.group)
    expected_h = reference.lora_shrink(case.x_TD, case.arena, case.group)
    torch.testing.assert_close(actual_h, expected_h, rtol=1e-5, atol=1e-5)


def test_widened_bfloat16_is_exact_in_the_interpreter(interpreter: Executor):
    interpreter.submit(_check_bfloat16_through_upcast).result()


def _check_attention(query_lens: list[int], context_lens: list[int], dtype: torch.dtype, **options: object) -> None:
    from kernels import triton_attention

    case = attention_case(query_lens, context_lens, dtype=dtype, **options)
    expected = reference.paged_attention(*case.args, **case.options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        allocations = _guard_allocations(monkeypatch)
        actual = triton_attention.paged_attention(*case.args, **case.options)
    assert_close(actual, expected)
    assert [guards_intact(whole) for whole in allocations] == [True]


@DTYPES
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([1, 1, 1], [1, 45, 33]), ([6, 1, 12], [6, 9, 50])],
    ids=["decode", "mixed"],
)
def test_attention_equals_the_twin(
    interpreter: Executor, query_lens: list[int], context_lens: list[int], window: int | None, dtype: torch.dtype
):
    interpreter.submit(_check_attention, query_lens, context_lens, dtype, window=window, seed=3).result()


@pytest.mark.parametrize(
    "options",
    [
        {"group": 1, "num_kv_heads": 3},
        {"group": 3, "head_dim": 20, "num_kv_heads": 1},
        {"group": 7, "page_tokens": 1, "num_kv_heads": 1},
        {"page_tokens": 48, "window": 17},
    ],
    ids=["no-groups", "group-3", "group-7", "large-pages"],
)
def test_attention_shapes(interpreter: Executor, options: dict[str, object]):
    interpreter.submit(_check_attention, [1, 14, 2], [35, 40, 2], torch.float32, **options, seed=4).result()


def _check_store(dtype: torch.dtype, page_tokens: int) -> None:
    from kernels import triton_attention

    torch.manual_seed(0)
    qkv = torch.randn(7, 9, 6).to(dtype)
    k_TKH, v_TKH = qkv[:, 3:6], qkv[:, 6:]
    slots_T = torch.randperm(4 * page_tokens + 7)[:7]
    pages = [guarded((4 + -(-7 // page_tokens), 3, 2, page_tokens, 3, 6), dtype) for _ in range(2)]
    reference.store_kv(k_TKH, v_TKH, pages[0][0], 1, slots_T)
    triton_attention.store_kv(k_TKH, v_TKH, pages[1][0], 1, slots_T)
    assert torch.equal(pages[0][0].nan_to_num(99.0), pages[1][0].nan_to_num(99.0))
    assert guards_intact(pages[1][1])


@DTYPES
@pytest.mark.parametrize("page_tokens", [1, 5, 16])
def test_store_kv_equals_the_twin_and_stays_inside(interpreter: Executor, page_tokens: int, dtype: torch.dtype):
    interpreter.submit(_check_store, dtype, page_tokens).result()


INT_POINTERS = {"query_starts_ptr", "context_lens_ptr", "block_tables_ptr", "token_starts_ptr", "ranks_ptr"}
LONG_POINTERS = {"table_starts_ptr", "a_rows_ptr", "b_rows_ptr", "gain_rows_ptr", "ids_ptr", "slots_ptr"}


def _type_of(name: str, element: str) -> str:
    if name in INT_POINTERS:
        return "*i32"
    if name in LONG_POINTERS:
        return "*i64"
    if name in ("scalings_ptr", "h_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{element}"
    return "fp32" if name == "scale_log2" else "i32"


def _compile(module: str, kernel: str, element: str, constants: dict[str, int | bool]) -> tuple[str, int]:
    """Compile with the launcher's own constants. Returns the PTX and the bytes of shared memory per block."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(module), kernel)
    signature = {name: "constexpr" if name in constants else _type_of(name, element) for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return compiled.asm["ptx"], compiled.metadata.shared


ATTENTION = {"PAGE_TOKENS": 16, "GROUP": 4, "BLOCK_X": 32, "UPCAST": False}
VARIANTS = {
    "shrink-decode": ("lora", "shrink_kernel", {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_D": 128, "UPCAST": False}),
    "shrink-prefill": ("lora", "shrink_kernel", {"BLOCK_T": 32, "BLOCK_R": 64, "BLOCK_D": 128, "UPCAST": False}),
    "expand-decode": ("lora", "expand_kernel", {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_F": 128}),
    "expand-prefill": ("lora", "expand_kernel", {"BLOCK_T": 32, "BLOCK_R": 32, "BLOCK_F": 128}),
    "lookup": ("lora", "lookup_kernel", {"BLOCK_T": 16, "BLOCK_R": 16}),
    "dora": ("lora", "dora_kernel", {"HAS_BIAS": True, "BLOCK_T": 32, "BLOCK_F": 128}),
    "store": ("attention", "store_kernel", {"PAGE_TOKENS": 16, "BLOCK": 1024}),
    "decode": ("attention", "attention_kernel", {**ATTENTION, "HEAD_DIM": 128, "BLOCK_ROWS": 16, "BLOCK_H": 128}),
    "prefill": ("attention", "attention_kernel", {**ATTENTION, "HEAD_DIM": 128, "BLOCK_ROWS": 64, "BLOCK_H": 128}),
    "odd-head": ("attention", "attention_kernel", {**ATTENTION, "HEAD_DIM": 20, "BLOCK_ROWS": 64, "BLOCK_H": 32}),
}


@pytest.mark.parametrize("element", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_compiles_for_hopper(compiler: Executor, variant: str, element: str):
    module, kernel, constants = VARIANTS[variant]
    ptx, shared_bytes = compiler.submit(_compile, f"kernels.triton_{module}", kernel, element, constants).result()
    assert ".target sm_90" in ptx
    assert f".visible .entry {kernel}" in ptx
    assert "atom." not in ptx
    assert shared_bytes <= 227 * 1024
