"""Our model code against transformers: equal logits for every architecture and any split of tokens into steps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cluster.adapters.files import Adapter, load_adapter
from cluster.errors import InvalidCheckpointError
from cluster.storage.checkpoints import open_checkpoint
from kernels.attention import AttentionMetadata
from serving.model.batch import Batch, LoraBatch
from serving.model.config import read_model_config
from serving.model.layers import MODULE_KINDS, rope_tables
from serving.model.llama import CausalLM
from serving.model.weights import load_model
from tests.worlds.serving import make_adapter, make_checkpoint

PAGE_TOKENS = 4
NUM_PAGES = 192
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-mha": ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama-llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-3}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN, "head_dim": 14}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 7, "head_dim": 16}),
    "mistral-no-window": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"sliding_window": 5, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "num_key_value_heads": 3}),
    "qwen3-layer-types": (
        "Qwen3ForCausalLM",
        {
            "attention_bias": True,
            "head_dim": 18,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
compiled_or_not = pytest.mark.parametrize("is_compiled", [False, True], ids=["torch", "compiled"])
ARCHITECTURES = ("llama", "mistral-window", "qwen2-window", "qwen3")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def checkpoint(variant: str) -> Path:
        architecture, overrides = VARIANTS[variant]
        folder = make_checkpoint(tmp_path_factory.mktemp(variant), architecture, **overrides)
        shake(folder / "model.safetensors")
        return folder

    return checkpoint


def shake(file: Path) -> None:
    """Randomise norms and biases: the ones and zeros of a fresh checkpoint would hide a forgotten one."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})


def hugging_face(folder: Path, adapter: Adapter | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the reference model, with an adapter merged into its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for module, factors in (adapter.factors if adapter else {}).items():
        model.get_submodule(module).weight.data += factors.delta()
    return model


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Stream:
    """One sequence of a test: `adapter` is an index into the world's adapters."""

    tokens: list[int]
    adapter: int | None = None
    pages: list[int] = field(default_factory=list)


class PagedModel:
    """A model with an arena full of NaN, and minimal versions of cache and scheduler that place pages and adapters."""

    def __init__(self, folder: Path, adapters: Sequence[Adapter] = (), is_compiled: bool = False):
        self.model = load_model(folder, torch.float32, "cpu", is_compiled=is_compiled)
        self.page_elements = self.model.num_layers * 2 * PAGE_TOKENS * self.model.num_kv_heads * self.model.head_dim
        self.arena = torch.full((NUM_PAGES * self.page_elements,), float("nan"))
        order = torch.randperm(NUM_PAGES // 2, generator=torch.Generator().manual_seed(2))
        self.free_pages = order.tolist()  # the first half of the arena; adapters are in the second
        self.adapters = list(adapters)
        self.next_offset = NUM_PAGES // 2 * self.page_elements
        self.rows = [[self._place(adapter, module) for module in self.model.target_shapes] for adapter in adapters]

    def _place(self, adapter: Adapter, module: str) -> tuple[list[int], list[int]]:
        factors = adapter.factors.get(module)
        if factors is None:
            return [], []
        return [self._write(row) for row in factors.a_RD], [self._write(row) for row in factors.b_FR.T]

    def _write(self, row: Tensor) -> int:
        if self.next_offset % self.page_elements + len(row) > self.page_elements:  # rows never cross a page border
            self.next_offset += -self.next_offset % self.page_elements
        offset, self.next_offset = self.next_offset, self.next_offset + len(row)
        self.arena[offset : offset + len(row)] = row
        return offset

    @torch.inference_mode()
    def run(self, chunks: Sequence[tuple[Stream, int, int]], every_row: bool = False) -> Tensor:
        """Run `stream.tokens[start:end]` of each chunk, those without adapter last. Returns the logits of last rows."""
        return self.model.forward(self.batch(chunks, every_row), self.arena, PAGE_TOKENS)

    def batch(self, chunks: Sequence[tuple[Stream, int, int]], every_row: bool = False) -> Batch:
        slots = [self._slot(stream, position) for stream, start, end in chunks for position in range(start, end)]
        lengths = [end - start for _, start, end in chunks]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        num_blocks = max(len(stream.pages) for stream, _, _ in chunks)
        tables = [stream.pages + [0] * (num_blocks - len(stream.pages)) for stream, _, _ in chunks]
        return Batch(
            tokens_T=torch.tensor([token for stream, start, end in chunks for token in stream.tokens[start:end]]),
            positions_T=torch.cat([torch.arange(start, end) for _, start, end in chunks]),
            slots_T=torch.tensor(slots),
            attention=AttentionMetadata(
                query_starts=ends.int(),
                context_lens=torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
                block_tables_BW=torch.tensor(tables, dtype=torch.int32),
                max_query_tokens=max(lengths),
                max_context_tokens=max(end for _, _, end in chunks),
            ),
            logit_rows_O=torch.arange(sum(lengths)) if every_row else ends[1:] - 1,
            lora=self._lora(chunks),
        )

    def _slot(self, stream: Stream, position: int) -> int:
        while len(stream.pages) <= position // PAGE_TOKENS:
            stream.pages.append(self.free_pages.pop())
        return stream.pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS

    def _lora(self, chunks: Sequence[tuple[Stream, int, int]]) -> LoraBatch | None:
        """Return one segment per chunk, even if neighbouring chunks have the same adapter."""
        members = [(stream.adapter, end - start) for stream, start, end in chunks if stream.adapter is not None]
        if not members:
            return None
        rows_SM = [self.rows[adapter] for adapter, _ in members]
        ranks_SM = torch.tensor([[len(a) for a, _ in rows_M] for rows_M in rows_SM])
        modules = list(self.model.target_shapes)
        scalings = [[self.adapters[a].factors[m].scaling if m in self.adapters[a].factors else 0.0 for m in modules]
                    for a, _ in members]  # fmt: skip
        token_starts = torch.tensor([0, *(length for _, length in members)]).cumsum(0).int()
        return LoraBatch(
            layout=self.model.lora_layout(self.page_elements),
            token_starts=token_starts,
            sample_starts=token_starts,  # unused: no adapter here changes the head
            max_samples=0,
            is_dora_SM=torch.zeros_like(ranks_SM, dtype=torch.bool),
            has_dora=(False,) * len(modules),
            ranks_SM=ranks_SM.int(),
            scalings_SM=torch.tensor(scalings),
            table_starts_SM=(ranks_SM.flatten().cumsum(0) - ranks_SM.flatten()).view(ranks_SM.shape),
            a_rows=torch.tensor([offset for rows_M in rows_SM for a, _ in rows_M for offset in a], dtype=torch.int64),
            b_rows=torch.tensor([offset for rows_M in rows_SM for _, b in rows_M for offset in b], dtype=torch.int64),
            max_ranks=tuple(ranks_SM.amax(0).tolist()),
            max_tokens=max(length for _, length in members),
        )


def assert_same(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))


@compiled_or_not
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_in_one_step_equals_transformers(checkpoints, variant: str, is_compiled: bool):
    tokens = random_tokens(29)
    logits = PagedModel(checkpoints(variant), is_compiled=is_compiled).run([(Stream(tokens), 0, 29)], every_row=True)
    assert_same(logits, reference_logits(hugging_face(checkpoints(variant)), tokens))


@compiled_or_not
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_prefill_and_decode_equal_transformers(checkpoints, variant: str, is_compiled: bool):
    """Chunks end inside a page and at its end; then each token is a step. Earlier KV comes from the pages."""
    tokens = random_tokens(31, seed=1)
    world, stream = PagedModel(checkpoints(variant), is_compiled=is_compiled), Stream(tokens)
    borders = [0, 3, 8, 9, 21, *range(22, 32)]
    logits = [world.run([(stream, start, end)]) for start, end in pairwise(borders)]
    reference = reference_logits(hugging_face(checkpoints(variant)), tokens)
    assert_same(torch.cat(logits), reference[torch.tensor(borders[1:]) - 1])


def test_outputs_vary_enough_to_reveal_errors(checkpoints):
    reference = reference_logits(hugging_face(checkpoints("llama")), random_tokens(29))
    assert len(reference.argmax(-1).unique()) > 10
    assert reference.std() > 0.5


def make_adapters(folder: Path, checkpoint: Path) -> list[Adapter]:
    paths = [
        make_adapter(folder / "all", checkpoint, rank=8, seed=1),
        make_adapter(folder / "rslora", checkpoint, rank=3, rslora=True, seed=2, rank_pattern={"v_proj": 11}),
        make_adapter(folder / "some", checkpoint, rank=5, modules=("k_proj", "up_proj", "down_proj"), seed=3),
    ]
    return [load_adapter(path) for path in paths]


@compiled_or_not
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_mixed_batches_equal_merged_models(checkpoints, tmp_path: Path, variant: str, is_compiled: bool):
    """Several sequences, with and without adapters, prefill and decode in the same steps."""
    folder = checkpoints(variant)
    adapters = make_adapters(tmp_path, folder)
    world = PagedModel(folder, adapters, is_compiled)
    streams = [Stream(random_tokens(12 + 3 * i, seed=i), adapter) for i, adapter in enumerate((0, 0, 1, 2, None, None))]
    steps = [
        [(streams[0], 0, 9), (streams[2], 0, 1), (streams[4], 0, 13)],
        [(streams[0], 9, 10), (streams[1], 0, 14), (streams[2], 1, 17), (streams[3], 0, 20), (streams[5], 0, 6)],
        [(streams[0], 10, 11), (streams[2], 17, 18), (streams[3], 20, 21), (streams[4], 13, 14)],
        [(streams[1], 14, 15), (streams[5], 6, 27)],
    ]
    models = [hugging_face(folder, adapter) for adapter in (*adapters, None)]
    for step in steps:
        model_of = [models[-1 if stream.adapter is None else stream.adapter] for stream, _, _ in step]
        reference = [reference_logits(m, s.tokens[:end])[-1] for m, (s, _, end) in zip(model_of, step, strict=True)]
        assert_same(world.run(step), torch.stack(reference))


def test_adapters_change_the_outputs(checkpoints, tmp_path: Path):
    tokens = random_tokens(20)
    world = PagedModel(checkpoints("llama"), make_adapters(tmp_path, checkpoints("llama")))
    base, *adapted = [world.run([(Stream(tokens, a), 0, 20)], every_row=True).argmax(-1) for a in (None, 0, 1, 2)]
    assert all((one != base).float().mean() > 0.3 for one in adapted)


@compiled_or_not
def test_an_adapter_of_nan_changes_only_its_own_rows(checkpoints, tmp_path: Path, is_compiled: bool):
    adapters = make_adapters(tmp_path, checkpoints("llama"))
    next(iter(adapters[1].factors.values())).a_RD[0, 0] = float("nan")
    world = PagedModel(checkpoints("llama"), adapters, is_compiled)
    streams = [Stream(random_tokens(10, seed=i), adapter) for i, adapter in enumerate((0, 1, 2, None))]
    logits = world.run([(stream, 0, 10) for stream in streams])
    assert logits.isnan().any(-1).tolist() == [False, True, False, False]
    alone = torch.cat([world.run([(Stream(streams[i].tokens, streams[i].adapter), 0, 10)]) for i in (0, 2, 3)])
    torch.testing.assert_close(logits[[0, 2, 3]], alone, atol=1e-4, rtol=0)


def test_module_index_and_shapes(checkpoints):
    model = load_model(checkpoints("qwen3"), torch.float32, "cpu")
    paths = list(model.linear_shapes)
    assert [path.rsplit(".", 1)[1] for path in paths] == list(MODULE_KINDS) * model.num_layers
    assert model.linear_shapes["model.layers.1.self_attn.k_proj"] == (3 * 32, 60)
    assert model.linear_shapes["model.layers.0.mlp.down_proj"] == (60, 92)
    assert model.target_shapes == open_checkpoint(checkpoints("qwen3")).adaptable_shapes()
    assert list(model.target_shapes)[len(paths) :] == ["model.embed_tokens", "lm_head"]
    assert (model.target_shapes["model.embed_tokens"], model.target_shapes["lm_head"]) == ((60, 261), (261, 60))
    assert {path: tuple(weight.shape) for path, weight in model.target_weights().items()} == model.target_shapes
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (2, 3, 32)
    assert (model.vocab_size, model.max_position) == (261, 512)


@pytest.mark.parametrize("variant", ["llama", "llama-linear", "llama-llama3", "llama-yarn"])
def test_rope_tables_equal_those_of_transformers(checkpoints, variant: str):
    config = read_model_config(json.loads((checkpoints(variant) / "config.json").read_text()))
    for dtype in (torch.float32, torch.bfloat16):
        ours = rope_tables(config, dtype, torch.device("cpu"))
        theirs = LlamaRotaryEmbedding(config.rope)(torch.zeros(1, dtype=dtype), torch.arange(config.max_position)[None])
        for our, their in zip(ours, theirs, strict=True):
            assert torch.equal(torch.cat((our, our), -1), their[0])


def test_bfloat16_is_as_accurate_as_in_transformers(checkpoints):
    folder, tokens = checkpoints("qwen3"), random_tokens(24)
    truth = reference_logits(hugging_face(folder), tokens)
    theirs = reference_logits(hugging_face(folder, dtype=torch.bfloat16), tokens)
    world = PagedModel(folder)
    world.model = load_model(folder, torch.bfloat16, "cpu")
    world.arena = world.arena.bfloat16()
    ours = world.run([(Stream(tokens), 0, 24)], every_row=True)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().mean() < 1.5 * (theirs - truth).abs().mean()


def test_half_precision_checkpoint_is_converted(checkpoints, tmp_path: Path):
    folder = copy_checkpoint(checkpoints("llama"), tmp_path)
    save_file({name: t.half() for name, t in load_file(folder / "model.safetensors").items()}, weights_of(folder))
    parameters = load_model(folder, torch.float32, "cpu").parameters()
    stored = load_file(weights_of(folder))
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(parameters[name], stored[name].float()) for name in stored)


def test_a_head_in_the_file_is_loaded_even_if_the_config_ties_it(checkpoints, tmp_path: Path):
    folder = copy_checkpoint(checkpoints("llama-tied-mha"), tmp_path)
    tensors = load_file(weights_of(folder))
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(5))
    save_file({**tensors, "lm_head.weight": head}, weights_of(folder), metadata={"format": "pt"})
    model = load_model(folder, torch.float32, "cpu")
    assert torch.equal(model.parameters()["lm_head.weight"], head)
    assert torch.equal(model.parameters()["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def copy_checkpoint(source: Path, folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def load_edited(checkpoints, folder: Path, variant: str = "llama", **config: Any) -> CausalLM:
    copy_checkpoint(checkpoints(variant), folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return load_model(folder, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("variant", "config", "message"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ("llama", {"architectures": None}, "architecture '.none.'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ("llama", {"hidden_size": "many"}, "hidden_size"),
        ("llama", {"intermediate_size": 96}, r"mlp.gate_proj.weight' has shape \(92, 60\).*\(96, 60\)"),
        ("llama", {"num_hidden_layers": 3}, "missing tensor 'model.layers.2.* and 8 more"),
        ("llama", {"num_hidden_layers": 1}, "no place for tensor 'model.layers.1"),
        ("llama", {"attention_bias": True}, "missing tensor 'model.layers.0.self_attn.k_proj.bias'"),
        ("llama-biases", {"mlp_bias": False}, "no place for tensor 'model.layers.0.mlp.down_proj.bias'"),
        ("mistral-window", {"sliding_window": 0}, "sliding_window 0"),
        ("qwen3-layer-types", {"use_sliding_window": False}, "'sliding_attention' with sliding_window None"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    checkpoints, tmp_path: Path, variant: str, config: dict, message: str
):
    with pytest.raises(InvalidCheckpointError, match=message):
        load_edited(checkpoints, tmp_path, variant, **config)


def test_old_spellings_of_the_config_are_read(checkpoints, tmp_path: Path):
    """Checkpoints from before transformers 5 have top-level rope_theta and rope_scaling, and rotary buffers."""
    folder = copy_checkpoint(checkpoints("llama-llama3"), tmp_path)
    content = json.loads((folder / "config.json").read_text())
    rope = content.pop("rope_parameters")
    content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(content))
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(2)}
    save_file(load_file(weights_of(folder)) | buffers, weights_of(folder))
    tokens = random_tokens(20)
    logits = PagedModel(folder).run([(Stream(tokens), 0, 20)], every_row=True)
    assert_same(logits, reference_logits(hugging_face(checkpoints("llama-llama3")), tokens))
