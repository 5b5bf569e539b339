"""Runs a batch of requests on vLLM, with the interpreter of vLLM's environment: `python -I vllm.py INPUTS OUT`.

INPUTS is JSON with `model` (folder), `adapters` (folders), `requests` (`prompt` as token ids, `adapter` as an index or
null, `max_tokens`), `repeats`, and `engine` (keyword arguments of `vllm.LLM`). OUT is JSON with `runs`: for each repeat
`wall_s` and the `tokens` of each request. All requests are submitted at once. A first run is not timed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(inputs_file: str, out_file: str) -> None:
    """Answer the requests once to warm up, then `repeats` times."""
    from vllm import LLM

    inputs = json.loads(Path(inputs_file).read_text())
    llm = LLM(model=inputs["model"], **inputs["engine"])
    _answer(llm, inputs)
    runs = [_answer(llm, inputs) for _ in range(inputs["repeats"])]
    Path(out_file).write_text(json.dumps({"runs": runs}))


def _answer(llm: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = inputs["requests"]
    loras = [LoRARequest(str(number), number + 1, folder) for number, folder in enumerate(inputs["adapters"])]
    start_s = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": request["prompt"]} for request in requests],
        [SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True) for request in requests],
        lora_request=[None if request["adapter"] is None else loras[request["adapter"]] for request in requests],
        use_tqdm=False,
    )
    wall_s = time.perf_counter() - start_s
    return {"wall_s": wall_s, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}


if __name__ == "__main__":
    main(*sys.argv[1:])
