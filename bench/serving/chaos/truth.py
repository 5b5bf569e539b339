"""The expected answers of the fault run: greedy tokens by Hugging Face and PEFT in float64, each adapter alone.

Nothing here uses the engine, or this project's reader of adapters.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

MAX_NEW_TOKENS = 12
TIE = 1e-4  # closer logits are a tie: rounding in float32 may decide either way


def greedy_answers(
    base: Path, folders: Mapping[str, Path], prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[str | None, list[tuple[int, ...]]]]:
    """Yield the greedy tokens of all prompts, first for the base alone (None), then for each key of `folders`."""
    model: Any = _reference(base)
    yield None, _greedy(model, prompts)
    last = None
    for key, folder in folders.items():
        model = _adapted(model, folder, key)
        if last is not None:
            model.delete_adapter(last)
        yield key, _greedy(model, prompts)
        last = key


def are_likeliest(base: Path, folder: Path | None, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether each token, given those before it, has the highest logit or is within `TIE` of it."""
    model = _reference(base)
    if folder is not None:
        model = _adapted(model, folder, "only")
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, -len(tokens) :]
    chosen_T = logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logits_TV.max(1).values - chosen_T <= TIE).all())


def _reference(base: Path) -> Any:
    """Load the model in float64. The head is untied, since an adapter of the embedding must not change it."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model.eval()


def _adapted(model: Any, folder: Path, key: str) -> Any:
    with warnings.catch_warnings():  # PEFT looks for the base's vocabulary on the hub, and warns that it is not there
        warnings.simplefilter("ignore")
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=key)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=key)
    model.set_adapter(key)
    return model.to(torch.float64).eval()  # PEFT computes in the adapter's dtype


@torch.inference_mode()
def _greedy(model: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Decode all prompts in one batch, padded on the right: on the left, rows without any context would become NaN."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    positions_T = torch.arange(int(lengths_B.max()))
    ids_BT = torch.tensor([[*prompt, *[0] * (len(positions_T) - len(prompt))] for prompt in prompts])
    mask_BT = (positions_T < lengths_B[:, None]).long()
    out = model(ids_BT, attention_mask=mask_BT, position_ids=positions_T.expand_as(ids_BT), use_cache=True)
    logits_BV = out.logits[torch.arange(len(prompts)), lengths_B - 1]
    made = [logits_BV.argmax(-1)]
    for step in range(MAX_NEW_TOKENS - 1):
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(prompts), 1)], 1)
        fed, positions = made[-1][:, None], (lengths_B + step)[:, None]
        out = model(fed, attention_mask=mask_BT, position_ids=positions, past_key_values=out.past_key_values)
        made.append(out.logits[:, -1].argmax(-1))
    return [tuple(row) for row in torch.stack(made, 1).tolist()]
