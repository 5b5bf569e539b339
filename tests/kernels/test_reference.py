"""The twins against naive dense mathematics: a weight matrix per token, a full softmax per query."""

import math

import pytest
import torch

from kernels import reference
from tests.worlds.kernels import attention_case, dense_attention, dense_lora, lookup_case, lora_case, run_lora


@pytest.mark.parametrize("widths", [(40,), (40, 17, 17)], ids=["one", "three"])
@pytest.mark.parametrize("has_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_lora_adds_each_tokens_own_dense_delta(popularity, has_dora, widths):
    case = lora_case(popularity=popularity, num_tokens=23, num_adapters=9, has_dora=has_dora, widths=widths, seed=3)
    out_TF = case.base_TF.clone()
    run_lora(reference, case, out_TF)
    torch.testing.assert_close(out_TF, dense_lora(case), rtol=1e-5, atol=1e-5)


def test_shrink_is_zero_beyond_the_rank_and_without_adapter():
    case = lora_case(ranks=[3, 0, 8], widths=(40, 9), num_tokens=12, num_plain=2, seed=1)
    h_TR = reference.lora_shrink(case.x_TD, case.arena, case.group)
    assert h_TR.dtype == torch.float32
    for module, columns in zip(case.modules, h_TR.split([one.max_rank for one in case.group.modules], 1), strict=True):
        for token, adapter in enumerate(case.adapter_of_T):
            rank = 0 if adapter is None else module.ranks[adapter]
            assert torch.count_nonzero(columns[token, rank:]) == 0
            assert rank == 0 or torch.count_nonzero(columns[token, :rank]) == rank


def test_expand_and_dora_do_not_change_other_tokens():
    case = lora_case(ranks=[4, 0], num_tokens=9, num_plain=3, has_dora=True, seed=2)
    out_TF = case.base_TF.clone()
    reference.dora_scale(case.arena, case.group, out_TF, case.bias_F)
    reference.lora_expand(torch.ones(9, 4), case.arena, case.group, out_TF)
    untouched = [t for t, adapter in enumerate(case.adapter_of_T) if adapter != 0]
    assert len(untouched) > 3
    assert torch.equal(out_TF[untouched], case.base_TF[untouched])
    assert not torch.equal(out_TF[0], case.base_TF[0])


def test_lookup_reads_the_column_of_each_id():
    case = lookup_case(ranks=[3, 0, 8], num_tokens=14, num_plain=2, seed=4)
    actual = reference.lora_lookup(case.ids_T, case.arena, case.module, case.width)
    torch.testing.assert_close(actual, case.expected_TR)
    assert actual.abs().amax(1).count_nonzero() > 6


def test_store_kv_writes_the_slots_and_nothing_else():
    torch.manual_seed(0)
    kv_pages = torch.zeros(5, 3, 2, 4, 2, 6)
    k_TKH, v_TKH = torch.randn(4, 2, 6), torch.randn(4, 2, 6)
    slots = [19, 0, 7, 8]
    reference.store_kv(k_TKH, v_TKH, kv_pages, 1, torch.tensor(slots))
    for t, slot in enumerate(slots):
        assert torch.equal(kv_pages[slot // 4, 1, :, slot % 4], torch.stack((k_TKH[t], v_TKH[t])))
    assert torch.count_nonzero(kv_pages) == k_TKH.numel() + v_TKH.numel()


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_is_the_full_softmax(window, group):
    case = attention_case(query_lens=[1, 5, 1, 7], context_lens=[9, 5, 1, 20], group=group, window=window, seed=4)
    out_TNH = reference.paged_attention(*case.args, **case.options)
    torch.testing.assert_close(out_TNH, dense_attention(case), rtol=1e-5, atol=1e-5)


def test_attention_to_one_token_is_that_tokens_value():
    case = attention_case(query_lens=[1], context_lens=[1], seed=5)
    out_TNH = reference.paged_attention(*case.args, **case.options)
    v_KH = case.v_by_sequence[0][0]
    torch.testing.assert_close(out_TNH[0], v_KH.repeat_interleave(case.group, 0))
    assert math.isfinite(out_TNH.sum().item())
