"""The twins against naive dense mathematics: a weight matrix per token, a full softmax per query."""

import math

import pytest
import torch

from kernels import reference
from tests.kernel_cases import attention_case, dense_attention, dense_lora, lora_case


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_lora_adds_each_tokens_own_dense_delta(popularity):
    case = lora_case(popularity=popularity, num_tokens=23, num_adapters=9, seed=3)
    h_TR = reference.lora_shrink(case.x_TD, case.arena, case.segments)
    out_TF = case.base_TF.clone()
    reference.lora_expand(h_TR, case.arena, case.segments, out_TF)
    assert h_TR.shape == (23, case.segments.max_rank)
    assert h_TR.dtype == torch.float32
    torch.testing.assert_close(out_TF, dense_lora(case), rtol=1e-5, atol=1e-5)


def test_shrink_is_zero_beyond_the_rank_and_without_adapter():
    case = lora_case(ranks=[3, 0, 8], num_tokens=12, num_plain=2, seed=1)
    h_TR = reference.lora_shrink(case.x_TD, case.arena, case.segments)
    for token, adapter in enumerate(case.adapter_of_T):
        rank = 0 if adapter is None else case.ranks[adapter]
        assert torch.count_nonzero(h_TR[token, rank:]) == 0
        assert rank == 0 or torch.count_nonzero(h_TR[token, :rank]) == rank


def test_expand_leaves_tokens_without_adapter_bit_for_bit():
    case = lora_case(ranks=[4, 0], num_tokens=9, num_plain=3, seed=2)
    out_TF = case.base_TF.clone()
    reference.lora_expand(torch.ones(9, 4), case.arena, case.segments, out_TF)
    untouched = [t for t, adapter in enumerate(case.adapter_of_T) if adapter != 0]
    assert len(untouched) > 3
    assert torch.equal(out_TF[untouched], case.base_TF[untouched])


def test_store_kv_writes_the_slots_and_nothing_else():
    torch.manual_seed(0)
    kv_pages = torch.zeros(5, 3, 2, 4, 2, 6)
    k_TKH, v_TKH = torch.randn(4, 2, 6), torch.randn(4, 2, 6)
    slots = [19, 0, 7, 8]
    reference.store_kv(k_TKH, v_TKH, kv_pages, torch.tensor(slots), layer=1)
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
