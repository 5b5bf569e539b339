"""Tiny bases that know a few chats by heart, one for each format of tool calls; they differ in their chat templates."""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.models import byte_tokenizer
from tests.worlds.serving import make_checkpoint

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
QUESTION = [{"role": "user", "content": "Weather in Rome and Oslo?"}]
THOUGHT = [{"role": "user", "content": "Think!"}]
RESULT = "It is warm."
CALLS = [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})]

_SYSTEM = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}HOW<|im_end|>\n"
    "{% endif %}"
)
_MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
)
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
_JSON = "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
_NO_THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def _template(how: str, call: str, opening: str = "") -> str:
    whole = _SYSTEM + _MESSAGES + _PROMPT
    return whole.replace("HOW", how).replace("CALL", call).replace("OPENING", opening)


TEMPLATES = {
    "hermes": _template("<tool_call>{name, arguments}</tool_call>", f"<tool_call>{_JSON}</tool_call>", _NO_THINKING),
    "llama3_json": _template("Write <|python_tag|> and {name, parameters}.", _JSON),
    "mistral": _template("Use the tools.", f"[TOOL_CALLS]{_JSON}"),
    "qwen3_coder": _template(
        "<tool_call><function=...><parameter=...></parameter></function></tool_call>",
        "<function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n"
        "</parameter>{% endfor %}</function>",
    ),
    "pythonic": _template("[func_name1(params_name1=params_value1)]", "[{{ c.function.name }}()]"),
    "opened": _template("none", "", "<think>\n"),
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
ANSWERS = {
    "hermes": 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama3_json": '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; '
    '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "mistral": 'I look.[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}, '
    '{"name": "weather", "arguments": {"city": "Oslo"}}]',
    "qwen3_coder": "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    "pythonic": '[weather(city="Rome"), weather(city="Oslo")]',
}


def after_calls() -> list[dict[str, Any]]:
    """Return the messages that follow the question: the calls as the API returns them, and their results."""
    function = [{"name": name, "arguments": f'{{"city": "{arguments["city"]}"}}'} for name, arguments in CALLS]
    calls = [{"id": f"call_{i}", "type": "function", "function": one} for i, one in enumerate(function)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "20"} for call in calls]
    return [{"role": "assistant", "content": None, "tool_calls": calls}, *results]


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer; the marks that real tokenizers have as special tokens are special here too."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    special = ["<|im_start|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<tool_call>", "</tool_call>")])
    tokenizer.chat_template = template
    return tokenizer


def make_chat_bases(folder: Path) -> Path:
    """Write one base for each template, all with the same weights, which know the chats of `_rows` by heart."""
    rows = _rows()
    size = {"vocab_size": len(chat_tokenizer("")), "eos_token_id": chat_tokenizer("").eos_token_id}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    first = make_checkpoint(folder / "plain", std=0.04, **size, **shape, head_dim=16)
    model = _learn(AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32), rows)
    model.generation_config.eos_token_id = size["eos_token_id"]
    model.save_pretrained(first)
    for name, template in TEMPLATES.items():
        if name != "plain":
            shutil.copytree(first, folder / name)
        chat_tokenizer(template).save_pretrained(folder / name)
    return folder


def _rows() -> list[tuple[list[int], list[int]]]:
    """Return the chats to learn, as tokens of prompt and answer."""
    chats = [(name, QUESTION, answer, {"tools": TOOLS}) for name, answer in ANSWERS.items()]
    turns = [*QUESTION, *after_calls()]
    for turn in turns[1]["tool_calls"]:
        turn["function"]["arguments"] = {"city": turn["function"]["arguments"][10:14]}
    chats.append(("hermes", turns, RESULT, {"tools": TOOLS}))
    chats.append(("hermes", THOUGHT, "<think>\nWell.\n</think>\n\nYes.", {}))
    chats.append(("hermes", THOUGHT, "No.", {"enable_thinking": False}))
    chats.append(("opened", THOUGHT, "Well.\n</think>\n\nYes.", {}))
    rows = []
    for name, messages, answer, more in chats:
        tokenizer = chat_tokenizer(TEMPLATES[name])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **more)
        rows.append((prompt, tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]))
    return rows


def _learn(model: Any, rows: list[tuple[list[int], list[int]]]) -> Any:
    """Train a model until it writes each row's answer."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
    labels_BT = torch.full((len(rows), width), -100)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens_BT[i, :end] = torch.tensor(prompt + answer)
        labels_BT[i, len(prompt) : end] = torch.tensor(answer)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(400):
        loss = model(input_ids=tokens_BT, labels=labels_BT).loss
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.03, f"the model did not learn its rows: {loss}"
    return model
