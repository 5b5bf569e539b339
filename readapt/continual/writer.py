"""Trains and scores a causal LM that answers with the label of its class.

All labels share the vocabulary and one frozen head. The loss of a stage therefore has to choose which tokens compete,
where a growing classifier simply compares the classes of the stage.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoded, Encoder, Prompt, Row, by_length, collate
from readapt.training.evaluate import label_logits

BATCH_ROWS = 64
Tokens = tuple[int, ...]


class LabelWriter:
    """The loss of writing the labels of a stage (see `learn.Learner`).

    With `hides_old`, tokens that only continue labels of earlier stages do not compete with the right token. So the
    loss does not push them down, and greedy decoding over the whole vocabulary can still write them.
    """

    def __init__(self, model: CausalLM, old: Sequence[Tokens], new: Sequence[Tokens], *, hides_old: bool = True):
        self._model = model
        self._hides_old = hides_old
        self._old_next, self._new_next = next_tokens(old), next_tokens(new)

    def loss(self, rows: Sequence[Encoded]) -> Tensor:
        """Return the mean cross-entropy over all tokens of the labels, end of sequence included."""
        logits_YV, labels_Y, _ = label_logits(self._model, collate(rows))
        if self._hides_old:
            prefixes = [prefix for row in rows for prefix in _prefixes(label_of(row))]
            hidden = [self._old_next.get(prefix, frozenset()) - self._new_next[prefix] for prefix in prefixes]
            logits_YV = logits_YV.masked_fill(_marked(hidden, logits_YV.shape[1]), -torch.inf)
        return cross_entropy(logits_YV, labels_Y)

    def parameters(self) -> list[nn.Parameter]:
        """Return no parameters: only the adapter is trained."""
        return []


def label_of(row: Encoded) -> Tokens:
    """Return the tokens of the row's label, end of sequence included."""
    return row.input_ids[row.num_prompt_tokens :]


def labels_in(rows: Iterable[Encoded]) -> list[Tokens]:
    """Return the distinct labels in order of their first row."""
    return list(dict.fromkeys(label_of(row) for row in rows))


def encode_labels(encoder: Encoder, labels: Sequence[str], prompt: Prompt) -> list[Tokens]:
    """Return the tokens of each label as an answer to `prompt`: a chat template may write text before the answer."""
    return [tuple(encoder.encode_completion(Row(prompt, label))) for label in labels]


def next_tokens(labels: Sequence[Tokens]) -> Mapping[Tokens, frozenset[int]]:
    """Return the tokens that may follow each prefix of a label."""
    found: dict[Tokens, set[int]] = {}
    for label in labels:
        for prefix in _prefixes(label):
            found.setdefault(prefix, set()).add(label[len(prefix)])
    return {prefix: frozenset(tokens) for prefix, tokens in found.items()}


@torch.no_grad()
def exact_points(model: CausalLM, rows: Sequence[Encoded], among: Sequence[Tokens] | None = None) -> float:
    """Return the share of rows, in points, whose label greedy decoding writes exactly. One forward pass per batch.

    `among` restricts decoding to these labels. By default any token can be written.
    """
    choices = None if among is None else next_tokens(among)
    ordered = by_length(rows)
    batches = [ordered[start : start + BATCH_ROWS] for start in range(0, len(ordered), BATCH_ROWS)]
    return 100.0 * sum(_num_exact(model, batch, choices) for batch in batches) / len(rows)


def _num_exact(model: CausalLM, rows: Sequence[Encoded], choices: Mapping[Tokens, frozenset[int]] | None) -> int:
    logits_YV, labels_Y, rows_Y = label_logits(model, collate(rows))
    if choices is not None:
        allowed = [choices[prefix] for row in rows for prefix in _prefixes(label_of(row))]
        logits_YV = logits_YV.masked_fill(~_marked(allowed, logits_YV.shape[1]), -torch.inf)
    return len(rows) - len(rows_Y[logits_YV.argmax(-1) != labels_Y].unique())


def _prefixes(label: Tokens) -> list[Tokens]:
    return [label[:length] for length in range(len(label))]


def _marked(tokens_of: Sequence[frozenset[int]], num_tokens: int) -> Tensor:
    """Return a mask [Y, V] that is true at the tokens of each position."""
    marked_YV = torch.zeros(len(tokens_of), num_tokens, dtype=torch.bool)
    pairs = [(position, token) for position, tokens in enumerate(tokens_of) for token in tokens]
    if pairs:
        positions, columns = torch.tensor(pairs).T
        marked_YV[positions, columns] = True
    return marked_YV
