"""A sentence encoder with a classifier that grows by the classes of each stage.

The backbone is any Hugging Face encoder. The feature of a sentence is the mean of its tokens' last hidden states,
scaled to length 1.

Beyond the usual shape letters: C classes so far, C2 classes of the latest stage; D is the width of a feature.
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

QUERY_AND_VALUE = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin")  # adapted, as in the paper on SD-LoRA
SCALE = 20.0  # of the logits, because features have length 1


@dataclass(frozen=True)
class SentenceEncoder:
    """A frozen backbone with its tokenizer."""

    backbone: Any
    tokenizer: Any
    max_tokens: int

    @classmethod
    def open(cls, folder: Path, max_tokens: int = 48) -> "SentenceEncoder":
        """Load a Hugging Face encoder. Raises InvalidCheckpointError if the folder does not hold one."""
        try:
            backbone = AutoModel.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InvalidCheckpointError(f"{folder}: cannot be read as an encoder: {error}") from error
        return cls(backbone.requires_grad_(False).eval(), tokenizer, max_tokens)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of the query and value linears, by module path."""
        modules = self.backbone.named_modules()
        linears = ((name, module) for name, module in modules if isinstance(module, nn.Linear))
        return {n: (m.out_features, m.in_features) for n, m in linears if n.rsplit(".", 1)[-1] in QUERY_AND_VALUE}

    def features(self, texts: Sequence[str]) -> Tensor:
        """Return one unit vector per text, [B, D]. It is differentiable with respect to an adapter on the backbone."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        hidden_BTD = self.backbone(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][..., None].to(hidden_BTD.dtype)
        return normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1)


class GrowingClassifier:
    """A linear classifier with one row per class. Rows of the latest stage are trainable, older rows are frozen.

    With `is_cosine` the rows are normalised too, so no class wins by the length of its row.
    """

    def __init__(self, encoder: SentenceEncoder, *, is_cosine: bool = True):
        self._encoder = encoder
        self._is_cosine = is_cosine
        self.labels: list[str] = []
        width = encoder.backbone.config.hidden_size
        self._old_CD = torch.zeros(0, width)
        self._new_C2D = nn.Parameter(torch.zeros(0, width))

    @torch.no_grad()
    def grow(self, rows: Sequence[Row], *, from_means: bool = True) -> None:
        """Add the classes of a stage's rows. They start at the means of their features, or at zero."""
        self._old_CD = self._classes().detach().clone()
        new = sorted({row.completion for row in rows} - set(self.labels))
        self.labels += new
        start_C2D = torch.zeros(len(new), self._old_CD.shape[1])
        if from_means:
            start_C2D = torch.stack(
                [self._mean([str(r.prompt) for r in rows if r.completion == label]) for label in new]
            )
        self._new_C2D = nn.Parameter(start_C2D)

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """Return the cross-entropy among the latest stage's classes."""
        labels = self.labels[len(self._old_CD) :]
        targets = torch.tensor([labels.index(row.completion) for row in rows])
        return cross_entropy(self._logits([str(row.prompt) for row in rows], self._new_C2D), targets)

    def parameters(self) -> list[nn.Parameter]:
        """Return the classifier's trainable rows."""
        return [self._new_C2D]

    def thaw(self) -> None:
        """Make all rows trainable, as in plain fine-tuning."""
        self._new_C2D = nn.Parameter(self._classes().detach().clone())
        self._old_CD = self._old_CD[:0]

    @torch.no_grad()
    def predict(self, prompts: Sequence[str], among: Sequence[str] | None = None, batch_rows: int = 64) -> list[str]:
        """Return the best class of each prompt, among all classes or those named."""
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
        return torch.cat([self._old_CD, self._new_C2D])

    def _logits(self, prompts: Sequence[str], rows_CD: Tensor) -> Tensor:
        directions_CD = normalize(rows_CD, dim=1) if self._is_cosine else rows_CD
        return SCALE * self._encoder.features(prompts) @ directions_CD.T

    def _mean(self, prompts: Sequence[str]) -> Tensor:
        return normalize(self._encoder.features(prompts).mean(0), dim=0)
