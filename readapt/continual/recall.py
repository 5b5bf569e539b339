"""Recall: a causal LM that writes labels keeps learning from statistics of its earlier classes' features.

This is our own method, besides SD-LoRA. The first stage trains a direction as usual. Later stages keep the features as
they are and train only a readout: the part of the model after the last layer's attention. They train it on vectors
drawn from Gaussians, one for each token of each label. A Gaussian has its own mean, and the covariance of its token's
place in the label. So the readout learns old and new classes together, although no row is kept.

Each stage trains a new readout, because the statistics hold everything that the previous one was taught. A readout that
is trained further clings to the Gaussians of the first classes (see
docs/experiments/extraction-and-continual.md).

Related: classifier alignment on class statistics for images (SLCA, arXiv 2303.05118). Here the classifier is the last
layer of the LM.

A feature is the residual input of the last layer, followed by the input of its attention's output projection.

Beyond the usual shape letters: P places (first, second, later token of a label); D is the width of a feature.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.errors import InvalidCheckpointError
from readapt.continual.directions import Decoupled, DirectionSettings, DirectionWeights
from readapt.continual.learn import Learner, Method, Recall, descend, learn_stage
from readapt.continual.writer import Tokens, label_of
from readapt.training.causal_lm import CausalLM
from readapt.training.data import IGNORED, Encoded, collate
from readapt.training.lora import blank, linear_shapes

NUM_PLACES = 3
FIRST_SHARE = 0.5  # of the draws are first tokens, which decide the class in most cases
KINDS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PLAIN = DirectionSettings(is_fresh_unit=False, learns_old_magnitudes=False)
RIDGE = 1e-6
ROWS_AT_ONCE = 64


def recall_stage(
    model: CausalLM,
    state: Decoupled,
    learner: Learner[Encoded],
    rows: Sequence[Encoded],
    method: Method,
    *,
    shapes: dict[str, tuple[int, int]],
    stage: int,
    seed: int = 0,
) -> Decoupled:
    """Learn one stage as `learn.learn_stage` does; all stages but the first train a readout on class statistics.

    The readout is the last of the returned directions and replaces that of the previous stage. Raises
    InvalidCheckpointError if the model does not have Llama's layout, TrainingError if the loss becomes infinite or NaN.
    """
    top = Top(model)
    if not state.directions:
        first = learn_stage(model, state, learner, rows, method, shapes=shapes, stage=stage, seed=seed)
        return recall(top, first, rows)
    state = recall(top, state, rows)
    settings = method.recall or Recall()
    features = _without_readout(state)
    fresh = blank(top.shapes, settings.rank, alpha=settings.rank, seed=seed)
    with DirectionWeights(model, features, fresh, 1.0, PLAIN) as weights:
        groups = [{"params": weights.factors(), "lr": settings.learning_rate}]
        vectors = draws(state.classes, settings.draws, seed)
        adam = replace(method, steps=settings.steps, optimizer="adam")
        descend(groups, lambda draw: cross_entropy(top.logits(draw[0]), draw[1]), vectors, adam)
        learned = weights.export()
    return replace(learned, inputs={}, has_readout=True)


def recall(top: "Top", state: Decoupled, rows: Sequence[Encoded]) -> Decoupled:
    """Return the state with statistics of these rows' classes added. The model must be bare."""
    with DirectionWeights(top.model, _without_readout(state)):
        vectors_YD, tokens_Y = top.features(rows)
    places = [(label_of(row), place) for row in rows for place in range(len(label_of(row)))]
    return replace(state, classes=with_classes(state.classes, vectors_YD, tokens_Y, places))


def _without_readout(state: Decoupled) -> Decoupled:
    """Return the state with only the directions that make the features."""
    if not state.has_readout:
        return state
    return replace(state, directions=state.directions[:-1], magnitudes=state.magnitudes[:-1], has_readout=False)


def with_classes(
    classes: Mapping[str, Tensor], vectors_YD: Tensor, tokens_Y: Tensor, places: Sequence[tuple[Tokens, int]]
) -> dict[str, Tensor]:
    """Return the class statistics with those of new vectors added.

    `places` names the label of each vector and the position of its token in the label.
    """
    width = vectors_YD.shape[1]
    found = {"scatter": torch.zeros(NUM_PLACES, width, width), "freedom": torch.zeros(NUM_PLACES)} | dict(classes)
    scatter_PDD, freedom_P = found["scatter"].clone(), found["freedom"].clone()
    means, tokens, place_of = [], [], []
    for key in dict.fromkeys(places):
        own = torch.tensor([index for index, other in enumerate(places) if other == key])
        mean_D, place = vectors_YD[own].mean(0), min(key[1], NUM_PLACES - 1)
        rest_YD = vectors_YD[own] - mean_D
        scatter_PDD[place] += rest_YD.T @ rest_YD
        freedom_P[place] += len(own) - 1
        means.append(mean_D)
        tokens.append(int(tokens_Y[own[0]]))
        place_of.append(place)
    new = {"means": torch.stack(means), "tokens": torch.tensor(tokens), "places": torch.tensor(place_of)}
    grown = {name: torch.cat([classes[name], part]) if name in classes else part for name, part in new.items()}
    return {"scatter": scatter_PDD, "freedom": freedom_P, **grown}


def draws(classes: Mapping[str, Tensor], num: int, seed: int) -> Iterator[list[Tensor]]:
    """Yield pairs of vectors [Y, D] and the tokens [Y] that the model should write from them, without end."""
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(classes["scatter"], classes["freedom"], strict=True)
    roots_PDD = torch.stack([_root(s / n.clamp_min(1)) for s, n in pairs])
    is_first = classes["places"] == 0
    first, later = is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0]
    num_first = int(num * FIRST_SHARE)
    while True:
        picks = (_pick(first, num_first, generator), _pick(later, num - num_first, generator))
        chosen = torch.cat(picks)
        vectors_YD = classes["means"][chosen]
        noise_YD = torch.randn(vectors_YD.shape, generator=generator)
        for place, root_DD in enumerate(roots_PDD):
            is_there_Y = classes["places"][chosen] == place
            vectors_YD[is_there_Y] += noise_YD[is_there_Y] @ root_DD.T
        yield [vectors_YD, classes["tokens"][chosen]]


def _pick(indices: Tensor, num: int, generator: torch.Generator) -> Tensor:
    return indices[torch.randint(len(indices), (num,), generator=generator)]


def _root(covariance_DD: Tensor) -> Tensor:
    """Return a square root of the covariance, with a ridge for directions that few rows leave empty.

    It uses eigenvalues because Cholesky would fail: a sum in float32 has eigenvalues below zero by more than the ridge.
    """
    ridge = RIDGE * float(covariance_DD.trace()) / len(covariance_DD) + 1e-12
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    return (vectors_DD * (values_D.clamp_min(0.0) + ridge).sqrt()).float()


class Top:
    """The part of a model after the last layer's attention, for models with Llama's module layout.

    `shapes` maps the module paths of its linears to (out, in). Raises InvalidCheckpointError for other layouts.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self._last: Any = model.base_model.layers[-1] if hasattr(model.base_model, "layers") else None
        if not all(hasattr(self._last, name) for name in ("post_attention_layernorm", "mlp", "self_attn")):
            raise InvalidCheckpointError("Recall needs a model with Llama's module layout. Choose another --method.")
        path = next(name for name, module in model.named_modules() if module is self._last)
        shapes = linear_shapes(model)
        self.shapes = {name: shapes[name] for name in (f"{path}.{kind}" for kind in KINDS)}

    def logits(self, vectors_YD: Tensor) -> Tensor:
        """Return the logits [Y, V] of these features, with the adapter that is on the model."""
        width = self.model.config.hidden_size
        middle_YD = vectors_YD[:, :width] + self._last.self_attn.o_proj(vectors_YD[:, width:])
        out_YD = middle_YD + self._last.mlp(self._last.post_attention_layernorm(middle_YD))
        logits_YV: Tensor = self.model.get_output_embeddings()(self.model.base_model.norm(out_YD))
        return logits_YV

    def features(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return the features [Y, D] that predict the rows' label tokens, and these tokens [Y], in row order."""
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
        vectors_BTD = torch.cat([seen["residual"], seen["attended"]], dim=2)[:, :-1]
        labels_BT = batch.labels_BT[:, 1:]
        pairs = zip(vectors_BTD, labels_BT, strict=True)
        return [(vectors_TD[labels_T != IGNORED], labels_T[labels_T != IGNORED]) for vectors_TD, labels_T in pairs]
