"""The compiled CPU path against the twins, over shapes that hypothesis picks, and how it is compiled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import LoraGroup, cpu, native, ops_for, reference
from tests.worlds.kernels import (
    assert_close,
    attention_case,
    guarded,
    guards_intact,
    lora_case,
    run_lora,
    sequences,
)

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
quick = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def ops():
    loaded = native.load_native()
    if loaded is None:
        pytest.skip("no AVX-512 or no compiler here")
    return loaded


@quick
@given(
    popularity=st.sampled_from(["distinct", "uniform", "zipf", "identical"]),
    num_tokens=st.integers(1, 80),
    num_plain=st.integers(0, 6),
    ranks=st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 31, 64]), min_size=1, max_size=20).filter(any),
    num_in=st.sampled_from([1, 24, 192, 1100]),
    widths=st.sampled_from([(1,), (17,), (1100,), (96, 17, 17), (33, 33)]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_lora_equals_the_twin(ops, num_tokens, num_plain, **options):
    case = lora_case(num_tokens=num_tokens + num_plain, num_plain=num_plain, has_dora=True, **options)
    expected_h = reference.lora_shrink(case.x_TD, case.arena, case.group)
    actual_h = ops.lora_shrink(case.x_TD, case.arena, case.group)
    scale = max(1.0, expected_h.abs().max().item())
    torch.testing.assert_close(actual_h / scale, expected_h / scale, rtol=1e-5, atol=1e-5)
    expected_TF, actual_TF = case.base_TF.clone(), case.base_TF.clone()
    run_lora(reference, case, expected_TF)
    run_lora(ops, case, actual_TF)
    scale = max(1.0, expected_TF.abs().max().item())
    assert_close(actual_TF / scale, expected_TF / scale)


def test_lora_adds_to_float32_logits_of_a_bfloat16_model(ops):
    case = lora_case(ranks=[3, 8], widths=(70,), num_tokens=9, dtype=torch.bfloat16, seed=3)
    h_TR = reference.lora_shrink(case.x_TD, case.arena, case.group)
    expected, actual = case.base_TF.float(), case.base_TF.float()
    reference.lora_expand(h_TR, case.arena, case.group, expected)
    ops.lora_expand(h_TR, case.arena, case.group, actual)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_lora_writes_only_its_columns_of_a_strided_output(ops):
    case = lora_case(popularity="zipf", ranks=[5, 0, 16, 3], widths=(24, 16), num_tokens=20, num_plain=3, seed=7)
    wide = torch.randn(20, 100)
    expected, actual = wide.clone(), wide.clone()
    run_lora(reference, case, expected[:, 30:70])
    run_lora(ops, case, actual[:, 30:70])
    assert_close(actual, expected)
    assert torch.equal(actual[:, :30], wide[:, :30])
    assert torch.equal(actual[:, 70:], wide[:, 70:])


def test_an_adapter_of_nan_changes_no_other_output(ops):
    case = lora_case(popularity="distinct", ranks=[2, 0, 8], widths=(40, 9), num_tokens=6, seed=8)
    for module in case.group.modules:
        for row in module.a_rows[module.table_starts[2] :][:8].tolist():
            case.arena[row : row + 24] = torch.nan
    out_TF = case.base_TF.clone()
    run_lora(ops, case, out_TF)
    assert out_TF[:4].isfinite().all()
    assert out_TF[4:, :40].isnan().all()


def test_a_tokens_lora_does_not_depend_on_the_rest_of_the_batch(ops):
    """Token 0 gives the same bits alone and beside 8 tokens of its adapter, which use wider loops."""
    case = lora_case(popularity="identical", ranks=[13], widths=(100,), num_tokens=9, num_in=200, seed=5)
    alone = [replace(m, token_starts=m.token_starts.clamp(max=1)) for m in case.group.modules]
    outs = [torch.zeros(9, 100), torch.zeros(9, 100)]
    for group, out_TF in zip((case.group, LoraGroup.of(alone, case.group.widths)), outs, strict=True):
        ops.lora_expand(ops.lora_shrink(case.x_TD, case.arena, group), case.arena, group, out_TF)
    assert torch.equal(outs[0][0], outs[1][0])
    assert outs[0][8].any()
    assert not outs[1][1:].any()


@quick
@given(
    lens=sequences,
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([12, 16, 32, 48, 64, 96, 128]),
    page_tokens=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 3, 8, 1000]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_attention_equals_the_twin(ops, lens, seed, **options):
    queries, contexts = zip(*lens, strict=True)
    case = attention_case(list(queries), list(contexts), seed=seed, **options)
    actual = ops.paged_attention(*case.args, **case.options)
    assert actual.is_contiguous()
    assert_close(actual, reference.paged_attention(*case.args, **case.options))


@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 1e4])
def test_attention_is_right_for_scores_of_any_size(ops, size):
    """The softmax is flat, picks a single key, or has exponents outside the range of float32."""
    case = attention_case([1, 3], [70, 40], num_kv_heads=2, group=3, head_dim=32, page_tokens=16, seed=1)
    case = replace(case, q_TNH=case.q_TNH * size)
    actual = ops.paged_attention(*case.args, **case.options)
    assert_close(actual, reference.paged_attention(*case.args, **case.options))


@quick
@given(num_tokens=st.integers(1, 30), page_tokens=st.sampled_from([1, 4, 16]), dtype=DTYPES, seed=st.integers(0, 99))
def test_store_kv_equals_the_twin_and_stays_inside(ops, num_tokens, page_tokens, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_tokens, 9, 6, generator=generator).to(dtype)
    k_TKH, v_TKH = qkv[:, 3:6].clone(), qkv[:, 6:]  # of different strides
    num_pages = num_tokens // page_tokens + 2
    slots_T = torch.randperm(num_pages * page_tokens, generator=generator)[:num_tokens]
    results = []
    for own in (reference, ops):
        kv_pages, whole = guarded((num_pages, 3, 2, page_tokens, 3, 6), dtype)
        own.store_kv(k_TKH, v_TKH, kv_pages, 1, slots_T)
        assert guards_intact(whole)
        results.append(kv_pages)
    assert torch.equal(results[0].nan_to_num(99.0), results[1].nan_to_num(99.0))


def test_several_threads_give_the_same_bits(ops, monkeypatch: pytest.MonkeyPatch):
    lora = lora_case(ranks=[8, 3, 16, 5], widths=(200, 90), num_tokens=120, num_in=192, seed=2)
    heads = attention_case([1, 40, 7], [70, 40, 300], num_kv_heads=3, group=2, head_dim=32, page_tokens=16, seed=2)
    results = []
    for num_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        out_TF = lora.base_TF.clone()
        run_lora(ops, lora, out_TF)
        results.append((out_TF, ops.paged_attention(*heads.args, **heads.options)))
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_an_existing_library_is_not_compiled_again(ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Path] = []
    compile_once = native._compile
    monkeypatch.setattr(native, "_compile", lambda library: (calls.append(library), compile_once(library)))
    assert native.load_native(tmp_path) is not None
    assert native.load_native(tmp_path) is not None
    assert [path.parent for path in calls] == [tmp_path]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


@pytest.mark.parametrize("command", [("no-such-compiler",), ("false",)])
def test_without_a_compiler_torch_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, command):
    monkeypatch.setattr(native, "_COMMAND", command)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert native.load_native(tmp_path) is None
    assert "cannot compile the CPU kernels" in caplog.text


def test_without_a_home_torch_is_used(monkeypatch: pytest.MonkeyPatch, caplog):
    """As in a container whose user has a number but no name."""

    def no_home(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(no_home))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert native.load_native() is None
    assert "cannot compile the CPU kernels" in caplog.text


def test_a_damaged_library_is_recompiled(ops, tmp_path: Path):
    assert native.load_native(tmp_path / "whole") is not None
    [library] = (tmp_path / "whole").iterdir()
    damaged = tmp_path / "damaged" / library.name  # another path: a process does not reload a library
    damaged.parent.mkdir()
    damaged.write_bytes(b"")
    assert native.load_native(damaged.parent) is not None
    assert damaged.stat().st_size > 0


def test_without_avx_512_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native.load_native(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_ops_for_returns_compiled_operations_on_request(ops):
    assert isinstance(ops_for("cpu", is_compiled=True).lora_shrink.__self__, native.NativeOps)
    assert ops_for("cpu").lora_shrink is cpu.lora_shrink
