"""A batch of requests on vLLM, run by the interpreter of vLLM's own environment: `python -I vllm.py JOB OUT`.

JOB, in JSON: `model` (folder), `adapters` (folders), `requests` (`prompt` as token ids, `adapter` as an index or null,
`max_tokens`), `repeats`, and `engine` (keyword arguments of `vllm.LLM`). OUT: `runs`, one for each repeat, of `wall_s`
and the `tokens` of each request. All requests are submitted at once; the same were answered once before the clock runs.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job_file: str, out_file: str) -> None:
    """Answer the job's requests, once to warm up and then `repeats` times."""
    from vllm import LLM

    job = json.loads(Path(job_file).read_text())
    llm = LLM(model=job["model"], **job["engine"])
    _answer(llm, job)
    runs = [_answer(llm, job) for _ in range(job["repeats"])]
    Path(out_file).write_text(json.dumps({"runs": runs}))


def _answer(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = job["requests"]
    loras = [LoRARequest(str(number), number + 1, folder) for number, folder in enumerate(job["adapters"])]
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
