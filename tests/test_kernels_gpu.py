"""The Triton kernels on a real GPU against the twins, bfloat16 included (the interpreter gets it wrong)."""

import pytest
import torch

from kernels import ops_for, reference
from tests.kernel_cases import attention_case, dense_attention, lora_case

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
@pytest.mark.parametrize(("num_tokens", "widths"), [(32, (192, 200)), (300, (1100, 37))])
def test_lora_equals_the_twin_and_itself(popularity, num_tokens, widths, dtype):
    case = lora_case(
        popularity=popularity,
        num_tokens=num_tokens,
        num_plain=3,
        ranks=[8, 0, 64, 3, 100, 16],
        num_in=widths[0],
        num_out=widths[1],
        dtype=dtype,
        device="cuda",
        seed=1,
    )
    ops = ops_for("cuda")
    expected_h = reference.lora_shrink(case.x_TD, case.arena, case.segments)
    actual_h = ops.lora_shrink(case.x_TD, case.arena, case.segments)
    torch.testing.assert_close(actual_h, expected_h, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual_h, ops.lora_shrink(case.x_TD, case.arena, case.segments))
    expected_TF, actual_TF = case.base_TF.clone(), case.base_TF.clone()
    reference.lora_expand(expected_h, case.arena, case.segments, expected_TF)
    ops.lora_expand(expected_h, case.arena, case.segments, actual_TF)
    scale = max(1.0, expected_TF.abs().max().item())
    assert_close(actual_TF / scale, expected_TF / scale)


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
    reference.store_kv(qkv[:, 3:6], qkv[:, 6:], pages[0], slots_T, 1)
    ops_for("cuda").store_kv(qkv[:, 3:6], qkv[:, 6:], pages[1], slots_T, 1)
    assert torch.equal(pages[0], pages[1])
