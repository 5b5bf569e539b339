"""Runs batched decoding on llama.cpp with one adapter, in its own environment: `python -I llamacpp.py INPUTS OUT`.

The environment has llama-cpp-python, gguf, safetensors and NumPy. INPUTS is JSON with `model` (a Hugging Face folder of
a Llama), `adapter` (a PEFT folder or null), `weights` (f32 or f16), `prompts` (token ids, all of one length), `batches`
(numbers of prompts that decode together), `decode_tokens`, `repeats`, `threads` and `gpu_layers` (layers computed on a
GPU). OUT is JSON with, for each batch, the best `setting` of flash attention and KV type, and medians over the repeats:
`tokens_per_s` times only the calls of `llama_decode`, as llama.cpp's own benchmark does, and `sampled_tokens_per_s`
includes choosing each next token. `tokens` come from the run without flash attention and with float32 KV.

Model and adapter are converted to GGUF here. llama.cpp rotates neighbouring pairs of a head's elements, Hugging Face
rotates pairs that are half a head apart. So the rows of q and k, and of their LoRA B, change order.
"""

import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PER_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SETTINGS = {  # llama.cpp's enum values of flash attention and KV type
    "no flash attention, f32 KV": (0, 0),
    "no flash attention, f16 KV": (0, 1),
    "flash attention, f32 KV": (1, 0),
    "flash attention, f16 KV": (1, 1),
}
_LORA = {"lora_A": "lora_a", "lora_B": "lora_b"}
_CELLS = 256  # the KV cache of a sequence is a multiple of this many tokens
_UNSUPPORTED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def gguf_name(module: str) -> str:
    """Return llama.cpp's name of a module of a Hugging Face Llama. Raises KeyError if it has none."""
    if module in WHOLE:
        return WHOLE[module]
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{int(layer)}.{PER_LAYER[rest]}"


def neighbouring_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Return rows [heads * head size, ...] in llama.cpp's order: the two rows of a rotated pair are neighbours."""
    pairs = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def reordered(module: str, rows: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Return a weight or a LoRA B of the module, rows [out, ...], in llama.cpp's order."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
    return neighbouring_pairs(rows, config[heads]) if heads else rows


def write_model(model: Path, file: Path, weights: str) -> None:
    """Write the checkpoint as GGUF: matrices in f32 or f16, norms in f32, and no tokenizer."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    _add_sizes(writer, config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if weights == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    for name, value in _tensors(model).items():
        module = name.removesuffix(".weight")
        value = reordered(module, value.astype(np.float32), config)
        is_half = weights == "f16" and value.ndim == 2
        writer.add_tensor(f"{gguf_name(module)}.weight", value.astype(np.float16) if is_half else value)
    _finish(writer)


def write_adapter(model: Path, adapter: Path, file: Path) -> None:
    """Write the PEFT adapter as GGUF in f32. Raises ValueError for options that GGUF adapters do not support."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    lora = json.loads((adapter / "adapter_config.json").read_text())
    unsupported = [key for key in _UNSUPPORTED if lora.get(key)]
    if unsupported:
        raise ValueError(f"{adapter}: an adapter with {', '.join(unsupported)} cannot be written as GGUF")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(lora["lora_alpha"]))
    for name, value in _tensors(adapter).items():
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        value = value.astype(np.float32)
        value = reordered(module, value, config) if side == "lora_B" else value
        writer.add_tensor(f"{gguf_name(module)}.weight.{_LORA[side]}", value)
    _finish(writer)


def _add_sizes(writer: Any, config: Mapping[str, Any]) -> None:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Run:
    """One prefill and decode of a batch: seconds of the decode steps, without and with sampling, and the tokens."""

    decode_s: float
    sampled_s: float
    tokens: list[list[int]]


class Decoder:
    """llama.cpp with a model and at most one adapter. Each batch and setting gets its own context."""

    def __init__(self, model: Path, adapter: Path | None, threads: int, gpu_layers: int):
        import llama_cpp

        self._api: Any = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self._model = _loaded(llama_cpp.llama_model_load_from_file(str(model).encode(), params), model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._adapter = None
        if adapter is not None:
            self._adapter = _loaded(llama_cpp.llama_adapter_lora_init(self._model, str(adapter).encode()), adapter)
        self._threads = threads

    def runs(self, prompts: np.ndarray, decode_tokens: int, repeats: int, setting: tuple[int, int]) -> Iterator[Run]:
        """Decode greedily from prompts [sequences, tokens]: one warm-up run that is dropped, then `repeats` runs."""
        num_seqs, prompt_tokens = prompts.shape
        context = self._context(num_seqs, prompt_tokens + decode_tokens, setting)
        batch = self._api.llama_batch_init(max(num_seqs, prompt_tokens), 0, 1)
        for number in range(1 + repeats):
            self._api.llama_memory_clear(self._api.llama_get_memory(context), True)
            run = self._run(context, batch, prompts, decode_tokens)
            if number:
                yield run
        self._api.llama_batch_free(batch)
        self._api.llama_free(context)

    def _context(self, num_seqs: int, num_tokens: int, setting: tuple[int, int]) -> Any:
        params = self._api.llama_context_default_params()
        params.n_seq_max, params.n_ctx = num_seqs, -(-num_tokens // _CELLS) * _CELLS * num_seqs
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type, params.type_k = setting
        params.type_v = params.type_k
        params.kv_unified = False  # each sequence reads only its own cells
        context = _loaded(self._api.llama_init_from_model(self._model, params), "a context")
        if self._adapter is not None:
            adapters = (self._api.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            scales = (ctypes.c_float * 1)(1.0)
            _check(self._api.llama_set_adapters_lora(context, adapters, 1, scales))
        return context

    def _run(self, context: Any, batch: Any, prompts: np.ndarray, decode_tokens: int) -> Run:
        num_seqs, prompt_tokens = prompts.shape
        sampled = [np.array([self._prefill(context, batch, seq, prompt) for seq, prompt in enumerate(prompts)])]
        token, position = (np.ctypeslib.as_array(column, (num_seqs,)) for column in (batch.token, batch.pos))
        _address(batch, range(num_seqs), [True] * num_seqs)
        decode_s, start_s = 0.0, time.perf_counter()
        for step in range(decode_tokens - 1):
            token[:], position[:] = sampled[-1], prompt_tokens + step
            before_s = time.perf_counter()
            _check(self._api.llama_decode(context, batch))
            logits = self._api.llama_get_logits(context)  # waits for the end of the computation
            decode_s += time.perf_counter() - before_s
            sampled.append(np.ctypeslib.as_array(logits, (num_seqs, self._vocab_size)).argmax(-1))
        return Run(decode_s, time.perf_counter() - start_s, np.stack(sampled, 1).tolist())

    def _prefill(self, context: Any, batch: Any, sequence: int, prompt: np.ndarray) -> int:
        _address(batch, [sequence] * len(prompt), [*[False] * (len(prompt) - 1), True])
        for number, token in enumerate(prompt.tolist()):
            batch.token[number], batch.pos[number] = token, number
        _check(self._api.llama_decode(context, batch))
        logits = self._api.llama_get_logits(context)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def _address(batch: Any, sequences: Any, needs_logits: list[bool]) -> None:
    batch.n_tokens = len(needs_logits)
    for number, (sequence, needs) in enumerate(zip(sequences, needs_logits, strict=True)):
        batch.n_seq_id[number], batch.seq_id[number][0], batch.logits[number] = 1, sequence, needs


def _loaded(handle: Any, what: object) -> Any:
    if not handle:
        raise RuntimeError(f"llama.cpp failed to create {what}")
    return handle


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"llama.cpp returned error {code}")


def measure(decoder: Decoder, prompts: np.ndarray, decode_tokens: int, repeats: int) -> dict[str, Any]:
    """Decode these prompts together with each setting, and return the record of the best one."""
    runs = {name: list(decoder.runs(prompts, decode_tokens, repeats, setting)) for name, setting in SETTINGS.items()}
    seconds = {name: statistics.median(run.decode_s for run in some) for name, some in runs.items()}
    best = min(seconds, key=lambda name: seconds[name])
    decoded = len(prompts) * (decode_tokens - 1)
    return {
        "setting": best,
        "tokens_per_s": decoded / seconds[best],
        "sampled_tokens_per_s": decoded / statistics.median(run.sampled_s for run in runs[best]),
        "tokens": runs[next(iter(SETTINGS))][0].tokens,
    }


def main(inputs_file: str, out_file: str) -> None:
    """Write the GGUF files and measure all batches."""
    inputs = json.loads(Path(inputs_file).read_text())
    prompts = np.array(inputs["prompts"], dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = Path(folder, "model.gguf"), Path(folder, "adapter.gguf")
        write_model(Path(inputs["model"]), model, inputs["weights"])
        if inputs["adapter"] is not None:
            write_adapter(Path(inputs["model"]), Path(inputs["adapter"]), adapter)
        decoder = Decoder(
            model, adapter if inputs["adapter"] is not None else None, inputs["threads"], inputs["gpu_layers"]
        )
        records = {
            size: measure(decoder, prompts[:size], inputs["decode_tokens"], inputs["repeats"])
            for size in inputs["batches"]
        }
    Path(out_file).write_text(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
