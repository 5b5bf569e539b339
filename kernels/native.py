"""The C++ operations of `cpu_ops.cpp`, called through ctypes; `kernels.reference` defines them.

The source is compiled on first use, once per version of the source, into a folder in the user's home. Inputs that the
C++ does not support (float16, unusual head sizes) go to `kernels.cpu`.
"""

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from array import array
from contextlib import suppress
from ctypes import c_float, c_int, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from kernels import cpu, pointwise
from kernels.attention import AttentionMetadata
from kernels.segments import LoraGroup

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_ops.cpp")
_CACHE = Path(".cache") / "relora"  # below the user's home
_COMMAND = ("c++", "-std=c++17", "-O3", "-march=x86-64-v4", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-shared")
_COMPILE_TIMEOUT_S = 300
_HEAD_DIMS = (16, 32, 48, 64, 96, 128)
_ARGUMENTS = {
    "lora_shrink": (c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int),
    "lora_expand": (c_int, c_int, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int),
    "paged_attention": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_int),
    "store_kv": (
        *(c_int64, c_void_p, c_int64, c_void_p, c_int64),
        *(c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64),
    ),
    "rms_norm": (c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_float),
    "rotate": (c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64),
    "mask_logits": (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64),
    "silu_mul": (c_int, c_void_p, c_int64, c_void_p, c_int64, c_int64),
}


class Dtype(IntEnum):
    """The number types of the C++, with the codes of its `enum Dtype`."""

    FLOAT32 = 0
    BFLOAT16 = 1


_DTYPES = {torch.float32: Dtype.FLOAT32, torch.bfloat16: Dtype.BFLOAT16}


def load_native(cache: Path | None = None) -> "NativeOps | None":
    """Load the compiled operations. Return None if the CPU has no AVX-512, or, with a warning, if compiling fails.

    The first call compiles for some seconds and keeps the library in `cache`, by default `~/.cache/relora`.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    version = hashlib.sha256(_SOURCE.read_bytes() + " ".join(_COMMAND).encode()).hexdigest()[:16]
    try:
        library = (cache or Path.home() / _CACHE) / f"cpu_ops-{version}.so"
        if library.exists():
            with suppress(OSError):  # a damaged library is recompiled below
                return NativeOps(ctypes.CDLL(str(library)))
        _compile(library)
        return NativeOps(ctypes.CDLL(str(library)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: the user has no home
        detail = getattr(error, "stderr", None) or error
        log.warning("cannot compile the CPU kernels, using the slower ones of torch: %s", detail)
        return None


def _compile(library: Path) -> None:
    """Compile into a temporary folder and move the result, because several processes may compile at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled = Path(folder) / library.name
        command = [*_COMMAND, "-o", str(compiled), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
        os.replace(compiled, library)


class NativeOps:
    """The compiled operations. They use `torch.get_num_threads()` threads."""

    lora_lookup = staticmethod(cpu.lora_lookup)
    dora_scale = staticmethod(cpu.dora_scale)

    def __init__(self, library: ctypes.CDLL):
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._c = library

    def lora_shrink(self, x_TD: Tensor, arena: Tensor, group: LoraGroup) -> Tensor:
        """Multiply each token with its adapter's `lora_a`; see `kernels.reference.lora_shrink`."""
        dtype = _DTYPES.get(arena.dtype)
        if dtype is None:
            return cpu.lora_shrink(x_TD, arena, group)
        assert x_TD.dtype == arena.dtype
        assert x_TD.stride(1) == arena.stride(0) == 1
        h_TR = torch.zeros(x_TD.shape[0], group.num_columns, dtype=torch.float32)
        self._c.lora_shrink(
            dtype,
            group.addresses.group,
            x_TD.data_ptr(),
            x_TD.stride(0),
            x_TD.shape[1],
            arena.data_ptr(),
            h_TR.data_ptr(),
            group.num_columns,
            torch.get_num_threads(),
        )
        return h_TR

    def lora_expand(self, h_TR: Tensor, arena: Tensor, group: LoraGroup, out_TF: Tensor) -> None:
        """Add `h @ lora_b^T` of each token's adapter to `out_TF`; see `kernels.reference.lora_expand`."""
        dtype, out_dtype = _DTYPES.get(arena.dtype), _DTYPES.get(out_TF.dtype)
        if dtype is None or out_dtype is None:
            cpu.lora_expand(h_TR, arena, group, out_TF)
            return
        assert out_TF.dtype in (arena.dtype, torch.float32)
        assert h_TR.stride(1) == out_TF.stride(1) == arena.stride(0) == 1
        self._c.lora_expand(
            dtype,
            out_dtype,
            group.addresses.group,
            h_TR.data_ptr(),
            h_TR.stride(0),
            arena.data_ptr(),
            out_TF.data_ptr(),
            out_TF.stride(0),
            torch.get_num_threads(),
        )

    def store_kv(self, k_TKH: Tensor, v_TKH: Tensor, kv_pages: Tensor, layer: int, slots_T: Tensor) -> None:
        """Write the keys and values of new tokens to their pages; see `kernels.reference.store_kv`."""
        size, strides = kv_pages.itemsize, kv_pages.stride()
        k_TKH, v_TKH = _rows(k_TKH), _rows(v_TKH)
        assert k_TKH.dtype == v_TKH.dtype == kv_pages.dtype
        keys = kv_pages.data_ptr() + layer * strides[1] * size
        self._c.store_kv(
            strides[3] * size,
            k_TKH.data_ptr(),
            k_TKH.stride(0) * size,
            v_TKH.data_ptr(),
            v_TKH.stride(0) * size,
            keys,
            keys + strides[2] * size,
            strides[0] * size,
            kv_pages.shape[3],
            slots_T.data_ptr(),
            slots_T.shape[0],
        )

    def paged_attention(
        self,
        q_TNH: Tensor,
        kv_pages: Tensor,
        layer: int,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend causally over paged keys and values; see `kernels.reference.paged_attention`."""
        dtype, num_heads, head_dim = _DTYPES.get(q_TNH.dtype), q_TNH.shape[1], q_TNH.shape[2]
        if dtype is None or head_dim not in _HEAD_DIMS:
            return cpu.paged_attention(q_TNH, kv_pages, layer, metadata, scale=scale, window=window)
        q_TNH = _rows(q_TNH)
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
        size, strides = kv_pages.itemsize, kv_pages.stride()
        keys = kv_pages.data_ptr() + layer * strides[1] * size
        page_tokens, num_kv_heads = kv_pages.shape[3:5]
        values = keys + strides[2] * size
        pages = array("q", (keys, values, strides[0], page_tokens, strides[3], num_kv_heads, head_dim))
        tables_BW = metadata.block_tables_BW
        tables = (metadata.query_starts.data_ptr(), metadata.context_lens.data_ptr(), tables_BW.data_ptr())
        sizes = (tables_BW.stride(0), len(tables_BW), window or 0, num_heads, q_TNH.stride(0))
        sequences = array("q", (*tables, *sizes))
        self._c.paged_attention(
            dtype,
            sequences.buffer_info()[0],
            pages.buffer_info()[0],
            q_TNH.data_ptr(),
            out_TNH.data_ptr(),
            scale,
            torch.get_num_threads(),
        )
        return out_TNH

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalise each row; see `kernels.reference.rms_norm`."""
        dtype = _DTYPES.get(x_TD.dtype)
        if dtype is None:
            return pointwise.rms_norm(x_TD, weight_D, eps)
        num_rows, size = x_TD.shape
        assert x_TD.stride(1) == 1
        out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        self._c.rms_norm(
            dtype, x_TD.data_ptr(), x_TD.stride(0), weight_D.data_ptr(), out_TD.data_ptr(), num_rows, size, eps
        )
        return out_TD

    def rotate(self, x_TNH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> None:
        """Apply rotary position embedding, in place; see `kernels.reference.rotate`."""
        dtype = _DTYPES.get(x_TNH.dtype)
        if dtype is None:
            pointwise.rotate(x_TNH, cos_TJ, sin_TJ)
            return
        num_tokens, num_heads, head_dim = x_TNH.shape
        assert x_TNH.stride()[1:] == (head_dim, 1)
        self._c.rotate(
            dtype,
            x_TNH.data_ptr(),
            x_TNH.stride(0),
            cos_TJ.data_ptr(),
            sin_TJ.data_ptr(),
            num_tokens,
            num_heads,
            head_dim // 2,
        )

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """Return `silu(gate) * up` of each row; see `kernels.reference.silu_mul`."""
        dtype, num_tokens, size = _DTYPES.get(gate_up_TF.dtype), gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
        if dtype is None:
            return pointwise.silu_mul(gate_up_TF)
        assert gate_up_TF.stride(1) == 1
        out_TF = torch.empty(num_tokens, size, dtype=gate_up_TF.dtype)
        self._c.silu_mul(dtype, gate_up_TF.data_ptr(), gate_up_TF.stride(0), out_TF.data_ptr(), num_tokens, size)
        return out_TF

    def mask_logits(self, logits_OV: Tensor, rows_O2: Tensor, bits_O2V2: Tensor) -> None:
        """Set the logits of the tokens that each row's mask lacks to -inf; see `kernels.reference.mask_logits`."""
        num_rows, num_words = bits_O2V2.shape
        assert logits_OV.dtype == torch.float32
        assert bits_O2V2.dtype == torch.int32
        assert rows_O2.dtype == torch.int64
        assert logits_OV.shape[1] <= 32 * num_words
        assert logits_OV.stride(1) == rows_O2.stride(0) == bits_O2V2.stride(1) == 1
        self._c.mask_logits(
            logits_OV.data_ptr(),
            logits_OV.stride(0),
            rows_O2.data_ptr(),
            num_rows,
            bits_O2V2.data_ptr(),
            bits_O2V2.stride(0),
            logits_OV.shape[1],
        )


def _rows(x_TNH: Tensor) -> Tensor:
    """Return x with each token's heads side by side: x itself if it is a slice of a projection, else a copy."""
    return x_TNH if x_TNH.stride()[1:] == (x_TNH.shape[2], 1) else x_TNH.contiguous()
