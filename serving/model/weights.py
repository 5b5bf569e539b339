"""Load a base model from a Hugging Face checkpoint, one tensor at a time, directly into the fused parameters."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from cluster.errors import InvalidCheckpointError
from cluster.storage.checkpoints import Checkpoint, open_checkpoint
from serving.model.config import read_model_config
from serving.model.llama import CausalLM

_HEAD = "lm_head.weight"
_RECOMPUTED = "rotary_emb.inv_freq"  # a buffer in old checkpoints


def load_model(folder: Path, dtype: torch.dtype, device: str | torch.device, *, is_compiled: bool = False) -> CausalLM:
    """Load a model to a device, converted to `dtype`. `is_compiled` asks for compiled kernels (see `ops_for`).

    Raises InvalidCheckpointError naming the file, architecture, option or tensor that cannot be used. A tensor is
    refused if it is missing, has another shape, or has no place in the architecture: dropping it would silently give
    wrong outputs.
    """
    checkpoint = open_checkpoint(folder)
    config = read_model_config(checkpoint.config)
    # A head in the file is loaded even if the config ties it to the embedding: it may have been trained separately.
    config = replace(config, is_tied=config.is_tied and _HEAD not in checkpoint.names())
    model = CausalLM(config, dtype, torch.device(device), is_compiled=is_compiled)
    parameters = model.parameters()
    _check_names(checkpoint, parameters)
    for name, parameter in parameters.items():
        shape = checkpoint.shape(name)
        if shape != tuple(parameter.shape):
            raise InvalidCheckpointError(
                f"{folder}: tensor {name!r} has shape {shape}, but config.json asks for {tuple(parameter.shape)}."
            )
        parameter.copy_(checkpoint.load(name))
    model.to_blocked()
    return model


def _check_names(checkpoint: Checkpoint, expected: Iterable[str]) -> None:
    stored = {name for name in checkpoint.names() if not name.endswith(_RECOMPUTED)}
    missing, unknown = set(expected) - stored, stored - set(expected)
    if missing:
        raise InvalidCheckpointError(f"{checkpoint.folder}: missing tensor {_some(missing)}.")
    if unknown:
        raise InvalidCheckpointError(
            f"{checkpoint.folder}: {checkpoint.config['architectures'][0]} has no place for tensor {_some(unknown)}."
        )


def _some(names: set[str]) -> str:
    first = min(names)
    return repr(first) if len(names) == 1 else f"{first!r} and {len(names) - 1} more"
