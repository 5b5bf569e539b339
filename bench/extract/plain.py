"""Extraction as one writes it by hand with PEFT: load both models, full SVD of every linear, `save_pretrained`.

PEFT's own `convert_to_lora` converts between kinds of PEFT adapters and takes no checkpoints.
`python -m bench.extract.plain BASE TUNED OUT RANK`.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(base: str, tuned: str, out: str, rank: int) -> None:
    """Extract all linears except the head."""
    torch.set_num_threads(1)
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, tuned))
    model = get_peft_model(old, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            delta_FD = new.get_submodule(name).weight - module.get_base_layer().weight
            u_FR2, s_R2, v_R2D = torch.linalg.svd(delta_FD, full_matrices=False)
            root_R = s_R2[:rank].sqrt()
            module.lora_A["default"].weight.copy_(root_R[:, None] * v_R2D[:rank])
            module.lora_B["default"].weight.copy_(u_FR2[:, :rank] * root_R)
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
