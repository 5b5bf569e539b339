"""Random inputs for the kernels, the plain data they are made from, and dense mathematics to compare with.

Adapter rows and KV pages are scattered over an arena that is NaN everywhere else. So a kernel that reads outside its
rows or pages returns NaN.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import AttentionMetadata
from kernels.ops import Ops
from kernels.segments import LoraGroup, LoraSegments

# Multiples of each precision's rounding error, relative and absolute: float32 sums up to about 1,100 products of order
# one; half precisions sum in float32 and round a few times.
TOLERANCE = {
    torch.float32: 84 * torch.finfo(torch.float32).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}
# A batch: the new tokens of each sequence, and all its tokens.
sequences = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5, 9]), st.integers(0, 40)).map(lambda two: (two[0], sum(two))),
    min_size=1,
    max_size=9,
)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that two results agree within the tolerance of `dtype`, by default that of `expected`."""
    tolerance = TOLERANCE[dtype or expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@dataclass(frozen=True, eq=False)
class ModuleCase:
    """One module's adapters. Each field is a list by adapter; `gains` are of DoRA adapters, else None."""

    ranks: list[int]
    scalings: list[float]
    a: list[Tensor]
    b: list[Tensor]
    gains: list[Tensor | None]


@dataclass(frozen=True, eq=False)
class LoraCase:
    """A group of modules and their adapters over one batch. `adapter_of_T[t]` is the adapter of token t, or None."""

    x_TD: Tensor
    base_TF: Tensor
    bias_F: Tensor
    arena: Tensor
    group: LoraGroup
    adapter_of_T: list[int | None]
    modules: list[ModuleCase]


def popular(popularity: str, num_tokens: int, num_adapters: int, rng: random.Random) -> list[int]:
    """Return an adapter for each token, sorted, drawn from the given distribution of popularity."""
    weights = {
        "uniform": [1.0] * num_adapters,
        "zipf": [1.0 / (i + 1) for i in range(num_adapters)],
        "identical": [1.0] + [0.0] * (num_adapters - 1),
    }
    if popularity == "distinct":
        return sorted(t % num_adapters for t in range(num_tokens))
    return sorted(rng.choices(range(num_adapters), weights[popularity], k=num_tokens))


def lora_case(
    *,
    popularity: str = "uniform",
    num_tokens: int = 16,
    num_plain: int = 0,
    num_adapters: int = 4,
    ranks: list[int] | None = None,
    num_in: int = 24,
    widths: tuple[int, ...] = (40,),
    has_dora: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> LoraCase:
    """Return random adapters of the given ranks (by default random ones, some 0) and tokens that use them.

    Each module has the ranks of the module before it, shifted by one adapter. With `has_dora`, every other adapter is a
    DoRA in the modules where it has a rank.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks = ranks or [rng.choice([0, 1, 2, 3, 5, 8, 13, 16, 33, 64]) for _ in range(num_adapters)]
    if max(ranks) == 0:
        ranks[0] = 4
    used = popular(popularity, num_tokens - num_plain, len(ranks), rng)
    modules = []
    for m, width in enumerate(widths):
        shifted = [ranks[(i + m) % len(ranks)] for i in range(len(ranks))]
        modules.append(_module(shifted, num_in, width, has_dora, dtype, rng, generator))
    arena, offsets = _scatter([_matrices(module) for module in modules], dtype, rng)
    segments = [_segments(used, *pair, rng) for pair in zip(modules, offsets, strict=True)]
    return LoraCase(
        x_TD=_randn(generator, num_tokens, num_in).to(dtype).to(device),
        base_TF=_randn(generator, num_tokens, sum(widths)).to(dtype).to(device),
        bias_F=_randn(generator, sum(widths)).to(dtype).to(device),
        arena=arena.to(device),
        group=LoraGroup.of([_moved(one, device) for one in segments], widths),
        adapter_of_T=[*used, *([None] * num_plain)],
        modules=modules,
    )


def dense_lora(case: LoraCase) -> Tensor:
    """Return `base + scaling * B A x` token by token with the dense [F, D] matrix, in float64; DoRA's gains first."""
    parts = case.base_TF.double().cpu().split(case.group.widths, 1)
    biases = case.bias_F.double().cpu().split(case.group.widths)
    for module, bias_F, out_TF in zip(case.modules, biases, parts, strict=True):
        for t, adapter in enumerate(case.adapter_of_T):
            if adapter is not None:
                gain_F = module.gains[adapter]
                if gain_F is not None:
                    out_TF[t] += gain_F.double() * (out_TF[t] - bias_F)
                delta_FD = module.b[adapter].double() @ module.a[adapter].double()
                out_TF[t] += module.scalings[adapter] * (delta_FD @ case.x_TD[t].double().cpu())
    return torch.cat(parts, 1).to(case.base_TF.dtype)


def run_lora(ops: Ops, case: LoraCase, out_TF: Tensor) -> None:
    """Run all LoRA operations of a group, as the model does."""
    if case.group.has_gains:
        ops.dora_scale(case.arena, case.group, out_TF, case.bias_F)
    ops.lora_expand(ops.lora_shrink(case.x_TD, case.arena, case.group), case.arena, case.group, out_TF)


@dataclass(frozen=True, eq=False)
class LookupCase:
    """Adapters of one embedding over the token ids of one batch. Rows are cut into pieces of `width` elements."""

    ids_T: Tensor
    arena: Tensor
    module: LoraSegments
    width: int
    expected_TR: Tensor


def lookup_case(
    *,
    ranks: list[int],
    num_tokens: int = 16,
    num_plain: int = 0,
    vocab: int = 50,
    width: int = 20,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> LookupCase:
    """Return random adapters, used in turn. The expected result is computed from whole matrices."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    used = popular("distinct", num_tokens - num_plain, len(ranks), rng)
    module = _module(ranks, vocab, 1, False, dtype, rng, generator)
    pieces = [list(a_RD.split(width, 1)) for a_RD in module.a]
    arena, offsets = _scatter([[row for piece in own for row in piece] for own in pieces], dtype, rng)
    empty = [[] for _ in ranks]
    segments = _segments(used, module, [(rows, none, none) for rows, none in zip(offsets, empty, strict=True)], rng)
    ids_T = torch.randint(0, vocab, (num_tokens,), generator=generator)
    expected_TR = torch.zeros(num_tokens, max(ranks[s] for s in set(used)))
    for t, s in enumerate(used):
        expected_TR[t, : ranks[s]] = module.scalings[s] * module.a[s][:, ids_T[t]].float()
    return LookupCase(ids_T.to(device), arena.to(device), _moved(segments, device), width, expected_TR.to(device))


@dataclass(frozen=True, eq=False)
class AttentionCase:
    """Sequences whose keys and values are in pages and, for comparison, in one tensor per sequence."""

    q_TNH: Tensor
    kv_pages: Tensor
    layer: int
    metadata: AttentionMetadata
    options: dict[str, Any]
    group: int
    k_by_sequence: list[Tensor]
    v_by_sequence: list[Tensor]

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of `paged_attention`."""
        return self.q_TNH, self.kv_pages, self.layer, self.metadata


def attention_case(
    query_lens: list[int],
    context_lens: list[int],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 12,
    page_tokens: int = 4,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> AttentionCase:
    """Return random sequences in scattered pages. q is a slice of a wider tensor, as from a fused projection."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_layers, layer = 3, 1
    num_blocks = [-(-num // page_tokens) for num in context_lens]
    pages = rng.sample(range(1, sum(num_blocks) + 4), sum(num_blocks))
    kv_pages = torch.full(
        (len(pages) + 4, num_layers, 2, page_tokens, num_kv_heads, head_dim), float("nan"), dtype=dtype
    )
    tables_BW = torch.zeros(len(context_lens), max(num_blocks), dtype=torch.int32)
    keys, values = [], []
    for b, num_context in enumerate(context_lens):
        own = [pages.pop() for _ in range(num_blocks[b])]
        tables_BW[b, : len(own)] = torch.tensor(own)
        sides = _randn(generator, 2, num_context, num_kv_heads, head_dim).to(dtype)
        for token in range(num_context):
            kv_pages[own[token // page_tokens], layer, :, token % page_tokens] = sides[:, token]
        keys.append(sides[0])
        values.append(sides[1])
    num_heads = num_kv_heads * group
    wide = _randn(generator, sum(query_lens), num_heads + 3, head_dim).to(dtype).to(device)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    return AttentionCase(
        q_TNH=wide[:, :num_heads],
        kv_pages=kv_pages.to(device),
        layer=layer,
        metadata=AttentionMetadata(
            query_starts=starts.to(device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
            block_tables_BW=tables_BW.to(device),
            max_query_tokens=max(query_lens),
            max_context_tokens=max(context_lens),
        ),
        options={"scale": head_dim**-0.5, "window": window},
        group=group,
        k_by_sequence=keys,
        v_by_sequence=values,
    )


def dense_attention(case: AttentionCase) -> Tensor:
    """Return attention with a full softmax for each query and head separately, in float64."""
    out_TNH = torch.zeros(case.q_TNH.shape, dtype=torch.float64)
    starts, window = case.metadata.query_starts.tolist(), case.options["window"]
    for b, (k_XKH, v_XKH) in enumerate(zip(case.k_by_sequence, case.v_by_sequence, strict=True)):
        for t in range(starts[b], starts[b + 1]):
            end = k_XKH.shape[0] - (starts[b + 1] - 1 - t)
            start = 0 if window is None else max(0, end - window)
            for head in range(case.q_TNH.shape[1]):
                k_XH, v_XH = (x[start:end, head // case.group].double() for x in (k_XKH, v_XKH))
                scores_X = k_XH @ case.q_TNH[t, head].double().cpu() * case.options["scale"]
                out_TNH[t, head] = scores_X.softmax(0) @ v_XH
    return out_TNH.to(case.q_TNH.dtype)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", guard: int = 64) -> tuple[Tensor, Tensor]:
    """Return a tensor of NaN between two guard zones of 7, and the whole allocation for `guards_intact`."""
    numel = int(torch.tensor(shape).prod())
    whole = torch.full((numel + 2 * guard,), 7.0, dtype=dtype, device=device)
    inner = whole[guard : guard + numel].view(shape)
    inner.fill_(float("nan"))
    return inner, whole


def guards_intact(whole: Tensor, guard: int = 64) -> bool:
    """Whether nothing was written outside the tensor that `guarded` made."""
    return bool((whole[:guard] == 7).all() and (whole[-guard:] == 7).all())


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.5


def _module(
    ranks: list[int],
    num_in: int,
    width: int,
    has_dora: bool,
    dtype: torch.dtype,
    rng: random.Random,
    generator: torch.Generator,
) -> ModuleCase:
    gains = [_randn(generator, width).to(dtype) if has_dora and s % 2 == 0 else None for s in range(len(ranks))]
    return ModuleCase(
        ranks=ranks,
        scalings=[rng.choice([0.25, 1.0, 2.0, 3.5]) for _ in ranks],
        a=[_randn(generator, rank, num_in).to(dtype) for rank in ranks],
        b=[_randn(generator, width, rank).to(dtype) for rank in ranks],
        gains=[gain if rank else None for rank, gain in zip(ranks, gains, strict=True)],
    )


def _matrices(module: ModuleCase) -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Return each adapter's rows of lora_a, of lora_b transposed, and of the gains."""
    gains = [[] if gain is None else [gain] for gain in module.gains]
    return [(list(a), list(b.T), gain) for a, b, gain in zip(module.a, module.b, gains, strict=True)]


def _scatter(lists: list[list[Any]], dtype: torch.dtype, rng: random.Random) -> tuple[Tensor, list[list[Any]]]:
    """Place rows at random offsets with gaps of NaN between them; the arena ends with the last row.

    Takes rows in lists nested to any depth. Returns the arena and the offsets in the same nesting.
    """
    rows: list[Tensor] = []
    flatten(lists, rows.append)
    order = rng.sample(range(len(rows)), len(rows))
    offsets, pieces, at = [0] * len(rows), [], 0
    for index in order:
        gap = rng.randint(0, 9)
        pieces += [torch.full((gap,), float("nan"), dtype=dtype), rows[index]]
        offsets[index] = at + gap
        at += gap + len(rows[index])
    remaining = iter(offsets)
    return torch.cat(pieces), flatten(lists, lambda _: next(remaining))


def flatten(nested: Any, visit: Any) -> Any:
    """Apply a function to all leaves in order, and return the results in the same nesting."""
    return [flatten(one, visit) for one in nested] if isinstance(nested, list | tuple) else visit(nested)


def _segments(used: list[int], module: ModuleCase, offsets: Any, rng: random.Random) -> LoraSegments:
    """Return segments of the adapters that a token uses. Their entries in the row tables are in random order."""
    present = sorted(set(used))
    counts = [used.count(s) for s in present]
    starts, table_a, table_b = {}, [0], [0]
    for s in rng.sample(range(len(module.ranks)), len(module.ranks)):
        a_rows, b_rows, _ = offsets[s]
        starts[s] = len(table_a)
        padding = [0] * abs(len(a_rows) - len(b_rows))
        table_a, table_b = table_a + (a_rows + padding)[: max(len(a_rows), len(b_rows))], table_b + b_rows
        table_b += [0] * (len(table_a) - len(table_b))
    gains = [offsets[s][2][0] if offsets[s][2] else -1 for s in present]
    return LoraSegments(
        token_starts=torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32),
        ranks=torch.tensor([module.ranks[s] for s in present], dtype=torch.int32),
        scalings=torch.tensor([module.scalings[s] for s in present], dtype=torch.float32),
        table_starts=torch.tensor([starts[s] for s in present], dtype=torch.int64),
        a_rows=torch.tensor(table_a, dtype=torch.int64),
        b_rows=torch.tensor(table_b, dtype=torch.int64),
        max_rank=max(module.ranks[s] for s in present),
        max_tokens=max(counts, default=0),
        gain_rows=torch.tensor(gains, dtype=torch.int64) if max(gains) >= 0 else None,
    )


def _moved(segments: LoraSegments, device: str) -> LoraSegments:
    fields = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(segments).items()}
    return LoraSegments(**fields)
