"""What the serving benchmark serves, and how much: the kit's small model, or a random Llama of a given shape.

A random Llama is written as an ordinary checkpoint, which every engine loads. Its output means nothing, but its speed
is that of a trained model.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.serving.served import ATTENTION, LINEARS
from bench.serving.workloads import Lengths
from cluster.config.settings import GIB, MIB

Dtype = Literal["float32", "float16", "bfloat16"]
_EIGHTH = Lengths(prompt=(8, 64), output=(8, 64))
_QUARTER = Lengths(prompt=(8, 128), output=(8, 128))


@dataclass(frozen=True)
class Size:
    """How much is measured of the model named `model`.

    `counts` are numbers of adapters; PEFT runs too at `peft_counts`. `rate` is far above what any engine here can
    serve. `loads` are shares of the most that our engine can serve. Lengths are 1/8 or 1/4 of S-LoRA's.
    """

    model: str = "stories3m-v1"
    counts: tuple[int, ...] = (1, 5, 100, 1000, 2000)
    peft_counts: tuple[int, ...] = (5, 100)
    rate: float = 400.0
    duration_s: float = 2.5
    peft_duration_s: float = 0.5
    lengths: Lengths = _EIGHTH
    rounds: int = 3
    decode_tokens: int = 64
    batches: tuple[int, ...] = (1, 8, 32)
    zipf_adapters: int = 1000
    zipf_requests: int = 1500
    zipf_rounds: int = 5
    cold_share: float = 0.1
    loads: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.1)
    trace_requests: int = 1000
    running: tuple[int, ...] = (64, 1024)
    chaos_requests: int = 100_000


QUICK = Size(
    counts=(1, 2, 4),
    peft_counts=(2,),
    duration_s=0.1,
    peft_duration_s=0.05,
    lengths=Lengths((4, 16), (4, 12)),
    rounds=1,
    decode_tokens=8,
    batches=(1, 2),
    zipf_adapters=12,
    zipf_requests=40,
    zipf_rounds=1,
    cold_share=0.6,
    loads=(0.5,),
    trace_requests=20,
    running=(8,),
    chaos_requests=300,
)


@dataclass(frozen=True)
class Shape:
    """One model. `sizes` are the values of its LlamaConfig; None means the kit's model of that name.

    `kv_bytes` hold the KV of all running requests. `memory_bytes` hold that and adapters, but not thousands of them,
    as on the GPUs of S-LoRA's paper. `many` are the modules that the adapters of the large workloads change.

    Adapters beyond `num_files` (None: no limit) share the files of the first ones, as in S-LoRA's own benchmark. The
    engine treats each as its own adapter, with its own pages and copies, but disk and host hold those weights once.
    """

    name: str
    sizes: Mapping[str, Any] | None = None
    size: Size = Size()
    memory_bytes: int = 512 * MIB
    kv_bytes: int = 16 * MIB
    many: tuple[str, ...] = LINEARS
    num_files: int | None = None
    trace_shrink: int = 8
    trace_max_tokens: int = 200


@dataclass(frozen=True)
class Subject:
    """A shape, and the device and dtype in which engines run it."""

    shape: Shape
    device: str = "cpu"
    dtype: Dtype = "float32"

    @property
    def label(self) -> str:
        """The subject's name in reports."""
        return self.shape.name if self.dtype == "float32" else f"{self.shape.name}-{self.dtype}"

    @property
    def folder(self) -> str:
        """The name of its folder; it changes when the sizes of a shape change."""
        sizes = self.shape.sizes
        return self.label if sizes is None else f"{self.label}-{zlib.crc32(repr(sorted(sizes.items())).encode()):08x}"


_ON_A_CORE = Size(
    counts=(1, 5, 2000),
    peft_counts=(5,),
    rate=100.0,
    duration_s=4.0,
    peft_duration_s=0.3,
    decode_tokens=32,
    zipf_adapters=200,
    zipf_requests=200,
    zipf_rounds=3,
    trace_requests=150,
)
_ON_A_GPU = Size(
    rate=200.0,
    duration_s=1.25,
    peft_duration_s=0.08,
    lengths=_QUARTER,
    zipf_requests=400,
    zipf_rounds=3,
)
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("stories3m-v1"),
        Shape(
            "125m",
            {
                "vocab_size": 32_000,
                "hidden_size": 768,
                "intermediate_size": 2560,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "num_key_value_heads": 12,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
            _ON_A_CORE,
            kv_bytes=320 * MIB,
            many=ATTENTION,
            num_files=64,
        ),
        Shape(
            "llama-7b",
            _LLAMA
            | {
                "vocab_size": 32_000,
                "intermediate_size": 11_008,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
            },
            _ON_A_GPU,
            memory_bytes=16 * GIB,
            kv_bytes=9 * GIB // 2,
            many=ATTENTION,
            num_files=64,
            trace_shrink=4,
            trace_max_tokens=400,
        ),
        Shape(
            "llama-3-8b",
            _LLAMA
            | {
                "vocab_size": 128_256,
                "intermediate_size": 14_336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            },
            _ON_A_GPU,
            memory_bytes=8 * GIB,
            kv_bytes=5 * GIB // 4,
            many=ATTENTION,
            num_files=64,
            trace_shrink=4,
            trace_max_tokens=400,
        ),
    )
}
