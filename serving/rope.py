"""Rotary position embedding (Su et al., arXiv 2104.09864) from tables that are computed once.

Shape letters: T tokens, N heads, H head dim, C = H / 2 frequencies, P positions.
"""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from serving.model_config import ModelConfig


def rope_tables(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, [P, C] each: computed in float32 and rounded once, as transformers does."""
    frequencies_C, scaling = _frequencies(config)
    positions_P1 = torch.arange(config.max_position, dtype=torch.float32, device=device)[:, None]
    angles_PC = positions_P1 * frequencies_C.to(device)
    return (angles_PC.cos() * scaling).to(dtype), (angles_PC.sin() * scaling).to(dtype)


def rotate(x_TNH: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + H / 2]) of each head by its angle; contiguous, in x's dtype."""
    first_TNC, second_TNC = x_TNH.chunk(2, dim=-1)
    cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
    return torch.cat((first_TNC * cos_T1C - second_TNC * sin_T1C, second_TNC * cos_T1C + first_TNC * sin_T1C), dim=-1)


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, and the factor on cosines and sines that some rope types have."""
    parameters = config.rope.rope_parameters
    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config.rope)
    exponents_C = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (parameters["rope_theta"] ** exponents_C), 1.0
