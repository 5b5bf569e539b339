"""Recall: a causal LM that writes labels goes on learning from statistics of its earlier classes' features.

Ours, beside SD-LoRA. The first stage trains a direction as always; later stages leave the features alone and train
only a readout, that is what comes after the last layer's attention, on vectors drawn from Gaussians: one for each token
of each label, with a mean of its own and the covariance of its place in the label. So old and new classes are learned
side by side though no row is kept. Each stage's readout begins anew, since the statistics have all that the one before
was taught: trained further, it clings to the Gaussians of the first classes (docs/experiments.md). Related: classifier
alignment on class statistics for images (SLCA, arXiv 2303.05118); here the classifier is the last layer of the LM.

A feature is the last layer's residual input and the input of its attention's output projection, side by side.

Shape letters: N label tokens of all classes, D a feature's width, P places (first, second, later token of a label),
B vectors, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.errors import InvalidCheckpointError
from readapt.continual.directions import Decoupled, Decoupling, DirectionWeights
from readapt.continual.learn import Learner, Method, Recall, descend, learn_stage
from readapt.continual.writer import Tokens, label_of
from readapt.training.data import IGNORED, Encoded, collate
from readapt.training.lora import blank, linear_shapes

NUM_PLACES = 3
FIRST_SHARE = 0.5  # of the draws: the first token decides among most classes, the others mostly follow from it
KINDS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PLAIN = Decoupling(is_fresh_unit=False, learns_old_magnitudes=False)
RIDGE = 1e-6
ROWS_AT_ONCE = 64


def recall_stage(
    model: Any,
    state: Decoupled,
    learner: Learner[Encoded],
    rows: Sequence[Encoded],
    method: Method,
    *,
    shapes: dict[str, tuple[int, int]],
    stage: int,
    seed: int = 0,
) -> Decoupled:
    """As `learn.learn_stage`: the first stage is learned by it, all others from the classes' statistics.

    The last of the returned directions is then the readout, in place of the stage's before. InvalidCheckpointError
    where the model is not of Llama's layout, TrainingError when the loss is no longer finite.
    """
    top = Top(model)
    if not state.directions:
        first = learn_stage(model, state, learner, rows, method, shapes=shapes, stage=stage, seed=seed)
        return recall(top, first, rows)
    state = recall(top, state, rows)
    how = method.recall or Recall()
    features = _without_readout(state)
    fresh = blank(top.shapes, how.rank, alpha=how.rank, seed=seed)
    with DirectionWeights(model, features, fresh, 1.0, PLAIN) as weights:
        groups = [{"params": weights.factors(), "lr": how.learning_rate}]
        vectors = draws(state.classes, how.draws, seed)
        plan = replace(method, steps=how.steps, optimizer="adam")
        descend(groups, lambda draw: cross_entropy(top.logits(draw[0]), draw[1]), vectors, plan)
        learned = weights.export()
    return replace(learned, inputs={}, has_readout=True)


def recall(top: "Top", state: Decoupled, rows: Sequence[Encoded]) -> Decoupled:
    """The state with these rows' classes among those that it has statistics of; for a bare model."""
    with DirectionWeights(top.model, _without_readout(state)):
        vectors_BD, tokens_B = top.features(rows)
    places = [(label_of(row), place) for row in rows for place in range(len(label_of(row)))]
    return replace(state, classes=with_classes(state.classes, vectors_BD, tokens_B, places))


def _without_readout(state: Decoupled) -> Decoupled:
    """The directions that make the features."""
    if not state.has_readout:
        return state
    return replace(state, directions=state.directions[:-1], magnitudes=state.magnitudes[:-1], has_readout=False)


def with_classes(
    classes: Mapping[str, Tensor], vectors_BD: Tensor, tokens_B: Tensor, places: Sequence[tuple[Tokens, int]]
) -> dict[str, Tensor]:
    """Class statistics with those of further vectors, of which `places` names the label and the token in it."""
    width = vectors_BD.shape[1]
    found = {"scatter": torch.zeros(NUM_PLACES, width, width), "freedom": torch.zeros(NUM_PLACES)} | dict(classes)
    scatter_PDD, freedom_P = found["scatter"].clone(), found["freedom"].clone()
    means, tokens, where = [], [], []
    for key in dict.fromkeys(places):
        own = torch.tensor([index for index, other in enumerate(places) if other == key])
        mean_D, place = vectors_BD[own].mean(0), min(key[1], NUM_PLACES - 1)
        rest_BD = vectors_BD[own] - mean_D
        scatter_PDD[place] += rest_BD.T @ rest_BD
        freedom_P[place] += len(own) - 1
        means.append(mean_D)
        tokens.append(int(tokens_B[own[0]]))
        where.append(place)
    new = {"means": torch.stack(means), "tokens": torch.tensor(tokens), "places": torch.tensor(where)}
    grown = {name: torch.cat([classes[name], part]) if name in classes else part for name, part in new.items()}
    return {"scatter": scatter_PDD, "freedom": freedom_P, **grown}


def draws(classes: Mapping[str, Tensor], num: int, seed: int) -> Iterator[list[Tensor]]:
    """Pairs of vectors [B, D] and the tokens [B] to be written from them, without end."""
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(classes["scatter"], classes["freedom"], strict=True)
    roots_PDD = torch.stack([_root(s / n.clamp_min(1)) for s, n in pairs])
    is_first = classes["places"] == 0
    first, later = is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0]
    num_first = int(num * FIRST_SHARE)
    while True:
        picks = (_pick(first, num_first, generator), _pick(later, num - num_first, generator))
        chosen = torch.cat(picks)
        vectors_BD = classes["means"][chosen]
        noise_BD = torch.randn(vectors_BD.shape, generator=generator)
        for place, root_DD in enumerate(roots_PDD):
            at = classes["places"][chosen] == place
            vectors_BD[at] += noise_BD[at] @ root_DD.T
        yield [vectors_BD, classes["tokens"][chosen]]


def _pick(indices: Tensor, num: int, generator: torch.Generator) -> Tensor:
    return indices[torch.randint(len(indices), (num,), generator=generator)]


def _root(covariance_DD: Tensor) -> Tensor:
    """A root of the covariance, with a ridge for what few rows leave open.

    By eigenvalues, not Cholesky: a sum in float32 has some that are below zero by more than the ridge.
    """
    ridge = RIDGE * float(covariance_DD.trace()) / len(covariance_DD) + 1e-12
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    return (vectors_DD * (values_D.clamp_min(0.0) + ridge).sqrt()).float()


class Top:
    """What comes after the last layer's attention, in Hugging Face's layout of Llama and its kin.

    `shapes` are (out, in) of its linears by module path. InvalidCheckpointError where the model has another layout.
    """

    def __init__(self, model: Any):
        self.model = model
        self._last: Any = model.base_model.layers[-1] if hasattr(model.base_model, "layers") else None
        if not all(hasattr(self._last, name) for name in ("post_attention_layernorm", "mlp", "self_attn")):
            raise InvalidCheckpointError("Recall knows models of Llama's layout only.")
        path = next(name for name, module in model.named_modules() if module is self._last)
        shapes = linear_shapes(model)
        self.shapes = {name: shapes[name] for name in (f"{path}.{kind}" for kind in KINDS)}

    def logits(self, vectors_BD: Tensor) -> Tensor:
        """What the model answers to these features [B, V], with whatever adapter is on it."""
        width = self.model.config.hidden_size
        middle = vectors_BD[:, :width] + self._last.self_attn.o_proj(vectors_BD[:, width:])
        out = middle + self._last.mlp(self._last.post_attention_layernorm(middle))
        logits_BV: Tensor = self.model.get_output_embeddings()(self.model.base_model.norm(out))
        return logits_BV

    def features(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """The features that the rows' label tokens are written from, B x D, and these tokens, B; in the rows' order."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chosen = order[start : start + ROWS_AT_ONCE]
            for index, pair in zip(chosen, self._features([rows[i] for i in chosen]), strict=True):
                parts[index].append(pair)
        pairs = [pair for part in parts for pair in part]
        return torch.cat([vectors for vectors, _ in pairs]), torch.cat([tokens for _, tokens in pairs])

    @torch.no_grad()
    def _features(self, rows: Sequence[Encoded]) -> list[tuple[Tensor, Tensor]]:
        batch, seen = collate(rows), {}
        parts = {"residual": self._last, "attended": self._last.self_attn.o_proj}
        handles = [
            part.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
            for name, part in parts.items()
        ]
        try:
            self.model.base_model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        both = torch.cat([seen["residual"], seen["attended"]], dim=2)[:, :-1]
        labels_BT = batch.labels_BT[:, 1:]
        return [(b[tokens != IGNORED], tokens[tokens != IGNORED]) for b, tokens in zip(both, labels_BT, strict=True)]
