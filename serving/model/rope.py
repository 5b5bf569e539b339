"""Rotary position embedding (Su et al., arXiv 2104.09864) from tables that are computed once.

Shape letters: C frequencies (half the head dim), P positions.
"""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from serving.model.config import ModelConfig


def rope_tables(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, [P, C] each: computed in float32 and rounded once, as transformers does."""
    frequencies_J, scaling = _frequencies(config)
    positions_P1 = torch.arange(config.max_position, dtype=torch.float32, device=device)[:, None]
    angles_PJ = positions_P1 * frequencies_J.to(device)
    return (angles_PJ.cos() * scaling).to(dtype), (angles_PJ.sin() * scaling).to(dtype)


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, and the factor on cosines and sines that some rope types have."""
    parameters = config.rope.rope_parameters
    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config.rope)
    exponents_J = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (parameters["rope_theta"] ** exponents_J), 1.0
