"""What is right in the fault run: greedy tokens by Hugging Face and PEFT in float64, each adapter alone.

Nothing of it comes from the engine, or from this project's reader of adapters.

Shape letters: N prompts, T tokens, V vocabulary.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

MAX_NEW_TOKENS = 12
TIE = 1e-4  # logits that are no further apart are a tie: rounding in float32 may decide it either way


def greedy_answers(
    base: Path, folders: Mapping[str, Path], prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[str | None, list[tuple[int, ...]]]]:
    """Greedy tokens of every prompt, first of the bare base, then of each adapter, by the key of its folder."""
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
    """Whether each token, given those before it, is as likely as the likeliest one to within `TIE`."""
    model = _reference(base)
    if folder is not None:
        model = _adapted(model, folder, "only")
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, -len(tokens) :]
    chosen_T = logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logits_TV.max(1).values - chosen_T <= TIE).all())


def _reference(base: Path) -> Any:
    """The model in float64; its head is untied, since an adapter of the embedding is none of the head's."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model.eval()


def _adapted(model: Any, folder: Path, key: str) -> Any:
    with warnings.catch_warnings():  # PEFT looks for the base's vocabulary on the hub, and says that it is not there
        warnings.simplefilter("ignore")
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=key)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=key)
    model.set_adapter(key)
    return model.to(torch.float64).eval()  # PEFT computes in the adapter's dtype


@torch.inference_mode()
def _greedy(model: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """All prompts in one batch, padded on the right: on the left, rows that may look at nothing would become NaN."""
    lengths_N = torch.tensor([len(prompt) for prompt in prompts])
    positions_T = torch.arange(int(lengths_N.max()))
    ids_NT = torch.tensor([[*prompt, *[0] * (len(positions_T) - len(prompt))] for prompt in prompts])
    mask_NT = (positions_T < lengths_N[:, None]).long()
    out = model(ids_NT, attention_mask=mask_NT, position_ids=positions_T.expand_as(ids_NT), use_cache=True)
    logits_NV = out.logits[torch.arange(len(prompts)), lengths_N - 1]
    made = [logits_NV.argmax(-1)]
    for step in range(MAX_NEW_TOKENS - 1):
        mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(prompts), 1)], 1)
        fed, positions = made[-1][:, None], (lengths_N + step)[:, None]
        out = model(fed, attention_mask=mask_NT, position_ids=positions, past_key_values=out.past_key_values)
        made.append(out.logits[:, -1].argmax(-1))
    return [tuple(row) for row in torch.stack(made, 1).tolist()]
