"""A sentence encoder with a classifier that grows: class-incremental learning as in the papers on it.

The backbone is any Hugging Face encoder; a sentence's feature is the mean of its tokens' last hidden states, scaled to
length 1. Shape letters: B rows, T tokens, D width, C classes so far, N new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from cluster.errors import InvalidCheckpointError
from readapt.training.data import Row

QUERY_AND_VALUE = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin")


@dataclass(frozen=True)
class SentenceEncoder:
    """A frozen backbone with its tokenizer."""

    backbone: Any
    tokenizer: Any
    max_tokens: int

    @classmethod
    def open(cls, folder: Path, max_tokens: int = 48) -> "SentenceEncoder":
        """Reads a Hugging Face encoder's folder; InvalidCheckpointError where it is none."""
        try:
            backbone = AutoModel.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InvalidCheckpointError(f"{folder}: cannot be read as an encoder: {error}") from error
        return cls(backbone.requires_grad_(False).eval(), tokenizer, max_tokens)

    def shapes(self, kinds: Sequence[str] = QUERY_AND_VALUE) -> dict[str, tuple[int, int]]:
        """(out, in) of the linears of these kinds, by module path; by default queries and values as in the paper."""
        modules = self.backbone.named_modules()
        linears = ((name, module) for name, module in modules if isinstance(module, nn.Linear))
        return {n: (m.out_features, m.in_features) for n, m in linears if n.rsplit(".", 1)[-1] in kinds}

    def features(self, texts: Sequence[str]) -> Tensor:
        """One vector of length 1 a text, B x D; differentiable through whatever adapter is on the backbone."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        hidden_BTD = self.backbone(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][..., None].to(hidden_BTD.dtype)
        return normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1)


class GrowingClassifier:
    """Classes by name in the order of their coming; the rows of the latest stage are trainable, older ones frozen.

    `scale` multiplies the logits: features have length 1. With `is_cosine` the rows are taken at length 1 too, so that
    no stage's classes win by the size of their rows.
    """

    def __init__(self, encoder: SentenceEncoder, *, scale: float = 20.0, is_cosine: bool = True):
        self._encoder, self._scale, self._is_cosine = encoder, scale, is_cosine
        self.labels: list[str] = []
        width = encoder.backbone.config.hidden_size
        self._old_CD = torch.zeros(0, width)
        self._new_ND = nn.Parameter(torch.zeros(0, width))

    @torch.no_grad()
    def grow(self, rows: Sequence[Row], *, from_means: bool = True) -> None:
        """Adds the classes of a stage's rows; they start at the means of their rows' features, or else at zero."""
        self._old_CD = self._classes().detach().clone()
        new = sorted({row.completion for row in rows} - set(self.labels))
        self.labels += new
        start_ND = torch.zeros(len(new), self._old_CD.shape[1])
        if from_means:
            start_ND = torch.stack([self._mean([r.prompt for r in rows if r.completion == label]) for label in new])
        self._new_ND = nn.Parameter(start_ND)

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """Cross-entropy among the latest stage's classes."""
        return self._loss(rows, self._new_ND, self.labels[len(self._old_CD) :])

    def loss_over_all(self, rows: Sequence[Row]) -> Tensor:
        """Cross-entropy among all classes so far."""
        return self._loss(rows, self._classes(), self.labels)

    def parameters(self) -> list[nn.Parameter]:
        """The latest stage's rows."""
        return [self._new_ND]

    def thaw(self) -> None:
        """Makes all rows trainable, as in plain fine-tuning."""
        self._new_ND = nn.Parameter(self._classes().detach().clone())
        self._old_CD = self._old_CD[:0]

    @torch.no_grad()
    def predict(self, prompts: Sequence[str], among: Sequence[str] | None = None, batch_rows: int = 64) -> list[str]:
        """The best class of each prompt, of all or of those named."""
        labels = self.labels if among is None else [label for label in self.labels if label in set(among)]
        rows_CD = self._classes()[[self.labels.index(label) for label in labels]]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_rows):
            indices = order[start : start + batch_rows]
            best = self._logits([prompts[i] for i in indices], rows_CD).argmax(1).tolist()
            for index, column in zip(indices, best, strict=True):
                answers[index] = labels[column]
        return answers

    def _classes(self) -> Tensor:
        return torch.cat([self._old_CD, self._new_ND])

    def _loss(self, rows: Sequence[Row], rows_CD: Tensor, labels: Sequence[str]) -> Tensor:
        targets = torch.tensor([labels.index(row.completion) for row in rows])
        return cross_entropy(self._logits([row.prompt for row in rows], rows_CD), targets)

    def _logits(self, prompts: Sequence[str], rows_CD: Tensor) -> Tensor:
        directions_CD = normalize(rows_CD, dim=1) if self._is_cosine else rows_CD
        return self._scale * self._encoder.features(prompts) @ directions_CD.T

    def _mean(self, prompts: Sequence[str]) -> Tensor:
        return normalize(self._encoder.features(prompts).mean(0), dim=0)
