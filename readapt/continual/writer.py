"""A causal LM that writes its class as a label: class-incremental learning of an adapter that is served as it is.

The classes' labels share one vocabulary and one frozen head, so what a growing classifier gets by itself has to be
said here: which tokens a stage's loss compares. Shape letters: L label positions, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from readapt.training.data import Encoded, Encoder, by_length, collate
from readapt.training.evaluate import label_logits

Rivals = Literal["unlearned", "stage", "all"]
Tokens = tuple[int, ...]


class LabelWriter:
    """The loss of writing a stage's labels (see `continual.Learner`).

    `rivals` are the tokens that a label's next token is compared with: "unlearned", all but those with which only
    earlier stages' labels go on (nothing pushes these down, and the label is still what greedy decoding writes);
    "stage", those with which a label of this stage goes on (what the growing classifier does); "all", the vocabulary.
    """

    def __init__(self, model: Any, old: Sequence[Tokens], new: Sequence[Tokens], rivals: Rivals = "unlearned"):
        self._model, self._rivals = model, rivals
        self._old_next, self._new_next = next_tokens(old), next_tokens(new)

    def loss(self, rows: Sequence[Encoded]) -> Tensor:
        """Mean cross-entropy over all tokens of the labels, end of sequence included."""
        logits_LV, labels_L, _ = label_logits(self._model, collate(rows))
        if self._rivals != "all":
            logits_LV = logits_LV.masked_fill(self._is_hidden(rows, logits_LV.shape[1]), -torch.inf)
        return cross_entropy(logits_LV, labels_L)

    def parameters(self) -> list[nn.Parameter]:
        """None: all that is learned is in the adapter."""
        return []

    def _is_hidden(self, rows: Sequence[Encoded], num_tokens: int) -> Tensor:
        prefixes = [prefix for row in rows for prefix in _prefixes(label_of(row))]
        if self._rivals == "stage":
            return ~_marked([self._new_next[prefix] for prefix in prefixes], num_tokens)
        nothing: frozenset[int] = frozenset()
        hidden = [self._old_next.get(p, nothing) - self._new_next[p] for p in prefixes]
        return _marked(hidden, num_tokens)


def label_of(row: Encoded) -> Tokens:
    """The tokens that the row's class is written with, end of sequence included."""
    return row.input_ids[row.num_prompt_tokens :]


def labels_in(rows: Iterable[Encoded]) -> list[Tokens]:
    """The different labels, in the order of their first row."""
    return list(dict.fromkeys(label_of(row) for row in rows))


def encode_labels(encoder: Encoder, labels: Sequence[str]) -> list[Tokens]:
    """The tokens that each label is written with, as `Encoder.encode` has them."""
    ids = [encoder.tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    return [(*tokens, encoder.eos_id) for tokens in ids]


def next_tokens(labels: Sequence[Tokens]) -> Mapping[Tokens, frozenset[int]]:
    """Which tokens may follow each beginning of a label."""
    found: dict[Tokens, set[int]] = {}
    for label in labels:
        for prefix in _prefixes(label):
            found.setdefault(prefix, set()).add(label[len(prefix)])
    return {prefix: frozenset(tokens) for prefix, tokens in found.items()}


@torch.no_grad()
def exact_points(
    model: Any, rows: Sequence[Encoded], among: Sequence[Tokens] | None = None, batch_rows: int = 64
) -> float:
    """The share of rows, in points, whose label greedy decoding writes exactly; one forward, as in `Evaluator`.

    `among` restricts decoding to these labels, as a server with a list of choices would; None: the free vocabulary.
    """
    choices = None if among is None else next_tokens(among)
    ordered = by_length(rows)
    chunks = [ordered[start : start + batch_rows] for start in range(0, len(ordered), batch_rows)]
    return 100.0 * sum(_num_exact(model, chunk, choices) for chunk in chunks) / len(rows)


def _num_exact(model: Any, rows: Sequence[Encoded], choices: Mapping[Tokens, frozenset[int]] | None) -> int:
    logits_LV, labels_L, rows_L = label_logits(model, collate(rows))
    if choices is not None:
        allowed = [choices[prefix] for row in rows for prefix in _prefixes(label_of(row))]
        logits_LV = logits_LV.masked_fill(~_marked(allowed, logits_LV.shape[1]), -torch.inf)
    return len(rows) - len(rows_L[logits_LV.argmax(-1) != labels_L].unique())


def _prefixes(label: Tokens) -> list[Tokens]:
    return [label[:length] for length in range(len(label))]


def _marked(tokens_of: Sequence[frozenset[int]], num_tokens: int) -> Tensor:
    marked_LV = torch.zeros(len(tokens_of), num_tokens, dtype=torch.bool)
    pairs = [(position, token) for position, tokens in enumerate(tokens_of) for token in tokens]
    if pairs:
        positions, columns = torch.tensor(pairs).T
        marked_LV[positions, columns] = True
    return marked_LV
