"""The Triton kernels on a real GPU against the twins, including bfloat16, which the interpreter computes wrongly."""

import pytest
import torch

from kernels import ops_for, reference
from tests.worlds.kernels import attention_case, dense_attention, lookup_case, lora_case, run_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16", "bf16"])


def assert_close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
@pytest.mark.parametrize(("num_tokens", "num_in", "widths"), [(32, 192, (200, 64, 64)), (300, 1100, (37,))])
def test_lora_equals_the_twin_and_itself(popularity, num_tokens, num_in, widths, dtype):
    case = lora_case(
        popularity=popularity,
        num_tokens=num_tokens,
        num_plain=3,
        ranks=[8, 0, 64, 3, 100, 16],
        num_in=num_in,
        widths=widths,
        has_dora=True,
        dtype=dtype,
        device="cuda",
        seed=1,
    )
    ops = ops_for("cuda")
    expected_h = reference.lora_shrink(case.x_TD, case.arena, case.group)
    actual_h = ops.lora_shrink(case.x_TD, case.arena, case.group)
    scale = max(1.0, expected_h.abs().max().item())
    torch.testing.assert_close(actual_h / scale, expected_h / scale, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual_h, ops.lora_shrink(case.x_TD, case.arena, case.group))
    expected_TF, actual_TF = case.base_TF.clone(), case.base_TF.clone()
    run_lora(reference, case, expected_TF)
    run_lora(ops, case, actual_TF)
    scale = max(1.0, expected_TF.abs().max().item())
    assert_close(actual_TF / scale, expected_TF / scale)


@DTYPES
def test_lookup_equals_the_twin(dtype):
    case = lookup_case(
        ranks=[8, 0, 64, 3], num_tokens=80, num_plain=3, vocab=300, width=130, dtype=dtype, device="cuda"
    )
    actual = ops_for("cuda").lora_lookup(case.ids_T, case.arena, case.module, case.width)
    assert torch.equal(actual, reference.lora_lookup(case.ids_T, case.arena, case.module, case.width))


@DTYPES
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128), (7, 20)])
def test_attention_equals_the_twin(group, head_dim, window, dtype):
    case = attention_case(
        [1, 70, 1, 16, 1],
        [300, 100, 1, 16, 33],
        group=group,
        head_dim=head_dim,
        page_tokens=16,
        window=window,
        dtype=dtype,
        device="cuda",
        seed=2,
    )
    actual = ops_for("cuda").paged_attention(*case.args, **case.options)
    assert_close(actual, reference.paged_attention(*case.args, **case.options))
    assert_close(actual, dense_attention(case))


@DTYPES
def test_store_kv_equals_the_twin(dtype):
    torch.manual_seed(0)
    qkv = torch.randn(50, 9, 20, device="cuda").to(dtype)
    slots_T = torch.randperm(16 * 9, device="cuda")[:50]
    pages = [torch.zeros(9, 2, 2, 16, 3, 20, dtype=dtype, device="cuda") for _ in range(2)]
    reference.store_kv(qkv[:, 3:6], qkv[:, 6:], pages[0], 1, slots_T)
    ops_for("cuda").store_kv(qkv[:, 3:6], qkv[:, 6:], pages[1], 1, slots_T)
    assert torch.equal(pages[0], pages[1])
