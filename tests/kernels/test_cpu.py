"""The torch CPU path against the twins, over shapes that hypothesis picks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu, ops_for, reference
from tests.worlds.kernels import (
    TOLERANCE,
    assert_close,
    attention_case,
    guarded,
    guards_intact,
    lookup_case,
    lora_case,
    run_lora,
    sequences,
)

DTYPES = st.sampled_from(list(TOLERANCE))
quick = settings(max_examples=100, deadline=None, derandomize=True)


WAYS = list(cpu._Way)


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request, monkeypatch):
    monkeypatch.setattr(cpu, "_cheapest_way", lambda *_: request.param)
    return request.param


@quick
@given(
    way=st.sampled_from([None, *WAYS]),
    popularity=st.sampled_from(["distinct", "uniform", "zipf", "identical"]),
    num_tokens=st.integers(1, 40),
    num_plain=st.integers(0, 6),
    ranks=st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 31, 64]), min_size=1, max_size=20).filter(any),
    num_in=st.sampled_from([1, 24, 192, 1100]),
    widths=st.sampled_from([(1,), (17,), (1100,), (96, 17, 17), (33, 33)]),
    has_dora=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_lora_equals_the_twin(way, num_tokens, num_plain, dtype, **options):
    case = lora_case(num_tokens=num_tokens + num_plain, num_plain=num_plain, dtype=dtype, **options)
    expected_h = reference.lora_shrink(case.x_TD, case.arena, case.group)
    expected_TF, actual_TF = case.base_TF.clone(), case.base_TF.clone()
    run_lora(reference, case, expected_TF)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if way is not None:
            monkeypatch.setattr(cpu, "_cheapest_way", lambda *_: way)
        actual_h = cpu.lora_shrink(case.x_TD, case.arena, case.group)
        run_lora(cpu, case, actual_TF)
    scale = torch.cat([expected_h.flatten(), torch.ones(1)]).abs().max().item()
    torch.testing.assert_close(actual_h / scale, expected_h / scale, rtol=1e-5, atol=1e-5)
    scale = max(1.0, expected_TF.abs().max().item())
    assert_close(actual_TF / scale, expected_TF / scale)


def test_every_way_equals_the_twin_on_a_strided_output(way):
    case = lora_case(
        popularity="zipf", ranks=[5, 0, 16, 3], widths=(24, 16), num_tokens=20, num_plain=3, has_dora=True, seed=7
    )
    wide = torch.randn(20, 100)
    expected, actual = wide.clone(), wide.clone()
    for ops, out in ((reference, expected), (cpu, actual)):
        run_lora(ops, case, out[:, 30:70])
    assert_close(actual, expected)
    assert torch.equal(actual[:, :30], wide[:, :30])
    assert torch.equal(actual[:, 70:], wide[:, 70:])


@pytest.mark.parametrize("what", ["a", "b", "gain"])
def test_an_overflowing_adapter_changes_no_other_output(way, what):
    """The last adapter is the bad one. The second has rank 0 in the first module and reads another adapter's rows."""
    case = lora_case(popularity="distinct", ranks=[2, 0, 8], widths=(40, 9), num_tokens=6, has_dora=True, seed=8)
    module = case.group.modules[0]
    rows = (module.a_rows if what == "a" else module.b_rows)[module.table_starts[2] :][:8].tolist()
    for row in rows if what != "gain" else [int(module.gain_rows[2])]:
        case.arena[row : row + (24 if what == "a" else 40)] = torch.inf if what == "a" else 3e38
    out_TF = case.base_TF.clone()
    run_lora(cpu, case, out_TF)
    assert out_TF[:4].isfinite().all()
    assert not out_TF[4:, :40].isfinite().all()


def test_an_overflowing_adapter_does_not_change_an_adapter_without_a_rank(way):
    case = lora_case(popularity="distinct", ranks=[2, 0, 8], widths=(40,), num_tokens=6, seed=8)
    module = case.group.modules[0]
    for row in module.a_rows[module.table_starts[2] :][:8].tolist():
        case.arena[row : row + 24] = torch.inf
    out_TF = case.base_TF.clone()
    run_lora(cpu, case, out_TF)
    assert torch.equal(out_TF[2:4], case.base_TF[2:4])


@quick
@given(
    ranks=st.lists(st.sampled_from([0, 1, 3, 8, 31]), min_size=1, max_size=8).filter(any),
    num_tokens=st.integers(8, 40),
    num_plain=st.integers(0, 6),
    width=st.sampled_from([1, 7, 20, 49, 50]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_lookup_equals_the_twin(num_tokens, num_plain, **options):
    case = lookup_case(num_tokens=num_tokens + num_plain, num_plain=num_plain, **options)
    actual = cpu.lora_lookup(case.ids_T, case.arena, case.module, case.width)
    assert torch.equal(actual, reference.lora_lookup(case.ids_T, case.arena, case.module, case.width))
    assert torch.equal(actual, case.expected_TR)


@quick
@given(
    lens=sequences,
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([4, 12, 16]),
    page_tokens=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 3, 8, 1000]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_attention_equals_the_twin(lens, num_kv_heads, group, head_dim, page_tokens, window, dtype, seed):
    case = attention_case(
        [query for query, _ in lens],
        [context for _, context in lens],
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        page_tokens=page_tokens,
        window=window,
        dtype=dtype,
        seed=seed,
    )
    expected = reference.paged_attention(*case.args, **case.options)
    actual = cpu.paged_attention(*case.args, **case.options)
    assert actual.is_contiguous()
    assert_close(actual, expected)


@quick
@given(num_tokens=st.integers(1, 30), page_tokens=st.sampled_from([1, 4, 16]), dtype=DTYPES, seed=st.integers(0, 99))
def test_store_kv_equals_the_twin_and_stays_inside(num_tokens, page_tokens, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_tokens, 9, 6, generator=generator).to(dtype)
    k_TKH, v_TKH = qkv[:, 3:6], qkv[:, 6:]
    num_pages = num_tokens // page_tokens + 2
    slots_T = torch.randperm(num_pages * page_tokens, generator=generator)[:num_tokens]
    results = []
    for ops in (reference, cpu):
        kv_pages, whole = guarded((num_pages, 2, 2, page_tokens, 3, 6), dtype)
        ops.store_kv(k_TKH, v_TKH, kv_pages, 1, slots_T)
        assert guards_intact(whole)
        results.append(kv_pages)
    assert torch.equal(results[0].nan_to_num(99.0), results[1].nan_to_num(99.0))


def test_ops_for_chooses_by_device():
    assert ops_for("cpu").lora_shrink is cpu.lora_shrink
    assert ops_for(torch.device("cpu")).paged_attention is cpu.paged_attention
    assert ops_for("meta").store_kv is reference.store_kv
