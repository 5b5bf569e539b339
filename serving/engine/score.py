"""Log-probabilities of prompts: the logits of a prompt's position give those of the token after it."""

import numpy as np
import torch
from torch import Tensor

from serving.engine.running import SchedulerOutput
from serving.engine.sampler import token_logprobs


def score_prompts(scheduled: SchedulerOutput, logits_OV: Tensor) -> Tensor:
    """Add log-probabilities to the sequences whose prompts get them. Return the logits of the tokens to sample."""
    for i in np.flatnonzero(scheduled.num_scores_B).tolist():
        sequence, num_scores = scheduled.sequences[i], int(scheduled.num_scores_B[i])
        start, row = int(scheduled.score_starts_B[i]), int(scheduled.logit_starts[i])
        num_top = sequence.request.sampling.num_prompt_logprobs
        assert num_top is not None, "the prompt needs no log-probabilities"
        tokens = torch.tensor(sequence.tokens[start + 1 : start + 1 + num_scores], device=logits_OV.device)
        logprobs_OV = logits_OV[row : row + num_scores].log_softmax(-1)
        sequence.prompt_logprobs += token_logprobs(logprobs_OV, tokens, [num_top] * num_scores)
    last_rows = scheduled.logit_starts[1:][scheduled.does_sample_B] - 1
    return logits_OV[torch.from_numpy(last_rows).to(logits_OV.device)]
