"""Operations on single rows, in torch and compiled, against the twins; products with blocked weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.onednn
from kernels import native, pointwise, reference
from kernels.onednn import from_blocked, linear, padded_rows, to_blocked

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=["torch", "compiled"])
def ops(request):
    loaded = native.load_native() if request.param == "compiled" else pointwise
    if loaded is None:
        pytest.skip("no AVX-512 or no compiler here")
    return loaded


def randn(seed, *shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@quick
@given(num_rows=st.integers(0, 5), size=st.sampled_from([1, 16, 24, 192, 301]), dtype=DTYPES, seed=st.integers(0, 99))
def test_rms_norm_equals_the_twin(ops, num_rows, size, dtype, seed):
    wide = randn(seed, num_rows, size + 7, dtype=dtype)
    x_TD, weight_D = wide[:, 3 : size + 3], randn(seed + 1, size, dtype=dtype)
    assert_close(ops.rms_norm(x_TD, weight_D, 1e-5), reference.rms_norm(x_TD, weight_D, 1e-5))
    assert_close(ops.rms_norm(x_TD * 0, weight_D, 1e-5), x_TD * 0)


@quick
@given(
    num_tokens=st.integers(0, 5),
    num_heads=st.integers(1, 4),
    half=st.sampled_from([1, 7, 16, 24, 40]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_rotate_equals_the_twin_and_stays_inside(ops, num_tokens, num_heads, half, dtype, seed):
    wide = randn(seed, num_tokens, num_heads + 2, 2 * half, dtype=dtype)
    expected = wide.clone()
    angles_TJ = randn(seed + 1, num_tokens, half, dtype=torch.float32)
    cos_TJ, sin_TJ = angles_TJ.cos().to(dtype), angles_TJ.sin().to(dtype)
    reference.rotate(expected[:, 1:-1], cos_TJ, sin_TJ)
    ops.rotate(wide[:, 1:-1], cos_TJ, sin_TJ)
    assert_close(wide, expected)
    assert torch.equal(wide[:, :: num_heads + 1], expected[:, :: num_heads + 1])


@quick
@given(num_rows=st.integers(0, 5), size=st.sampled_from([1, 16, 23, 512]), dtype=DTYPES, seed=st.integers(0, 99))
def test_silu_mul_equals_the_twin(ops, num_rows, size, dtype, seed):
    x_TF = randn(seed, num_rows, 2 * size, dtype=dtype)
    assert_close(ops.silu_mul(x_TF), reference.silu_mul(x_TF))


@pytest.mark.parametrize("value", [0.0, -30.0, 30.0, -87.2, -88.5, -1e30, 1e30, torch.nan])
def test_silu_mul_at_the_limits_of_exp(ops, value):
    x_TF = torch.tensor([[value, 1.0]])
    torch.testing.assert_close(ops.silu_mul(x_TF), reference.silu_mul(x_TF), equal_nan=True, rtol=1e-6, atol=1e-30)


@quick
@given(
    num_rows=st.integers(1, 4),
    masked=st.lists(st.integers(0, 3), unique=True, max_size=4),
    num_tokens=st.sampled_from([1, 16, 31, 64, 75, 301]),
    more_words=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_mask_logits_equals_the_twin_and_stays_inside(ops, num_rows, masked, num_tokens, more_words, seed):
    rows_O2 = torch.tensor([row for row in masked if row < num_rows], dtype=torch.int64)
    wide = randn(seed, num_rows, num_tokens + 5, dtype=torch.float32)
    num_words = -(-num_tokens // 32) + more_words
    draw = torch.Generator().manual_seed(seed)
    bits_O2V2 = torch.randint(-(2**31), 2**31, (len(rows_O2), num_words), generator=draw).to(torch.int32)
    expected = wide.clone()
    reference.mask_logits(expected[:, 2:-3], rows_O2, bits_O2V2)
    ops.mask_logits(wide[:, 2:-3], rows_O2, bits_O2V2)
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_with_a_blocked_weight(dtype, has_bias):
    weight_FD, x_TD = randn(0, 70, 50, dtype=dtype), randn(1, 40, 50, dtype=dtype)
    bias_F = randn(2, 70, dtype=dtype) if has_bias else None
    blocked = to_blocked(weight_FD)
    assert torch.equal(from_blocked(blocked), weight_FD)
    exact_TF = x_TD.double() @ weight_FD.double().T + (0 if bias_F is None else bias_F.double())
    for num_tokens in (0, 1, 3, 8, 40):
        actual = linear(x_TD[:num_tokens], blocked, bias_F)
        assert actual.dtype == dtype
        tolerance = 10 * TOLERANCE[dtype]
        torch.testing.assert_close(actual.double(), exact_TF[:num_tokens], rtol=tolerance, atol=tolerance)


def test_a_torch_without_the_operations_uses_plain_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels.onednn, "_OPERATIONS", ("_a_removed_operation",))
    weight_FD, x_TD = randn(0, 70, 50, dtype=torch.float32), randn(1, 9, 50, dtype=torch.float32)
    assert to_blocked(weight_FD) is weight_FD
    assert torch.equal(linear(x_TD, to_blocked(weight_FD)), x_TD @ weight_FD.T)


def test_a_rows_product_does_not_depend_on_the_number_of_rows():
    weight_FD, x_TD = to_blocked(randn(0, 320, 192, dtype=torch.float32)), randn(1, 64, 192, dtype=torch.float32)
    if not weight_FD.is_mkldnn:
        pytest.skip("no oneDNN here")
    whole_TF = linear(x_TD, weight_FD)
    for num_tokens in (1, 2, 5, 8, 33):
        assert torch.equal(linear(x_TD[:num_tokens], weight_FD), whole_TF[:num_tokens])


def test_onednn_sees_few_numbers_of_rows():
    """oneDNN compiles for each number of rows. Unrounded, 4096 numbers would mean 4096 compilations per product."""
    numbers = range(1, 4097)
    assert all(n <= padded_rows(n) <= n + n // 8 for n in numbers)
    assert len({padded_rows(n) for n in numbers}) <= 8 * 12
    assert [padded_rows(n) for n in range(16)] == list(range(16))
