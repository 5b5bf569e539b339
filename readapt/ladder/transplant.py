"""Functional transplant: a closed-form adapter that makes the new base do what the old service did.

Fusing in weight space spends the adapter's few ranks on everything that changed in the base. A service needs less: on
its task's inputs, the new base with the new adapter (the student) should compute what the old base with the old adapter
(the teacher) computed. Module by module this is linear least squares, without labels, gradients or steps.

Both models take the calibration rows through their layers, one layer at a time (`layer_walk`). At each site:

    x_UD  inputs of the site's modules in the student, with all earlier modules adapted; one row per token
    y_UF  what the adapter has to add: the teacher's output minus the student's. At o and down, which write into the
          residual stream, also the teacher's stream minus the student's: this repairs what the embeddings and earlier
          rank cuts left wrong
    M     = argmin |X M^T - Y|^2 + mu |M - M0|^2, where M0 is the old adapter's delta (for a DoRA: all it changes in the
          old weight) and mu = ridge x mean diagonal of X^T X. One Cholesky factor of the Gram matrix
          G = X^T X + mu I serves all modules of the site
    B, A  the best M of rank R in the metric of the outputs: with G = C C^T and U the left singular vectors of M C,
          B = U_R and A = U_R^T M (reduced-rank regression: Izenman, J. Multivariate Analysis 1975). R is the smallest
          rank that holds a given share of the energy |M C|^2

Each module is adapted before the student continues, so later modules see what earlier cuts lost and repair it. The last
layer's stream is read by the new head, not by the old one. Its target is therefore the stream from which the new head
computes the teacher's logits (`HeadMap`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adapters.files import Adapter, LoraFactors
from cluster.config.readapt import TransplantConfig
from cluster.errors import InvalidCheckpointError
from readapt.ladder.layer_walk import MLP_OUTPUT, Stream, Visitor, check_walk
from readapt.ladder.regression import HeadMap, Regression
from readapt.training.causal_lm import CausalLM
from readapt.training.data import IGNORED, BatchTensors, Encoded, collate
from readapt.training.lora import attached

BATCH_ROWS = 32
CHECKED_ROWS = 2


@dataclass(frozen=True)
class Transplant:
    """The new adapter, with scaling 1, and for each module the share of its map's energy that its rank holds."""

    adapter: Adapter
    energy: dict[str, float]


@torch.no_grad()
def transplant(
    teacher: CausalLM, old: Adapter, student: CausalLM, rows: Sequence[Encoded], config: TransplantConfig
) -> Transplant:
    """Fit an adapter with which `student` does on `rows` what `teacher` does with the adapter `old`.

    Both models are bare before and after. The result adapts the modules of `old`. Each gets the smallest rank that
    holds `config.energy` of its map, at least its old rank and at most `config.ranks[0]` (or its old rank if that is
    higher). Both models must be decoders of the Llama family with equally many layers, and must know the rows' tokens;
    their vocabularies may differ. Memory: the activations of one layer on all rows.
    Raises InvalidCheckpointError for other models, TrainingError if values are not finite.
    """
    check_walk(teacher, rows[:CHECKED_ROWS])
    check_walk(student, rows[:CHECKED_ROWS])
    old_layers, new_layers = teacher.base_model.layers, student.base_model.layers
    if len(old_layers) != len(new_layers):
        raise InvalidCheckpointError(
            f"a transplant needs two models with equally many layers, not {len(old_layers)} and {len(new_layers)}"
        )
    batches = [collate(rows[start : start + BATCH_ROWS]) for start in range(0, len(rows), BATCH_ROWS)]
    fitter = _Fitter(teacher, old, config)
    with attached(teacher, old):
        old_stream, new_stream = Stream(teacher, batches), Stream(student, batches)
        for index, (old_layer, new_layer) in enumerate(zip(old_layers, new_layers, strict=True)):
            record = _Record()
            old_stream.advance(old_layer, record.visit)
            if config.map_head and index == len(old_layers) - 1:
                record.redirect(HeadMap(teacher, student, _answers(batches)))
            new_stream.advance(new_layer, fitter.visitor(f"model.layers.{index}", record))
    return Transplant(Adapter(fitter.factors, base_model=old.base_model), fitter.energy)


def _answers(batches: Sequence[BatchTensors]) -> Tensor:
    """Return the label tokens [Y] of all batches."""
    return torch.cat([batch.labels_BT[batch.labels_BT != IGNORED] for batch in batches])


class _Record:
    """What the teacher computed in one layer: each module's output, and the stream that o and down add to."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}

    def visit(
        self, modules: tuple[str, ...], x_UD: Tensor, outputs: list[Tensor], stream_UD: Tensor | None
    ) -> list[Tensor]:
        self.outputs |= dict(zip(modules, outputs, strict=True))
        if stream_UD is not None:
            self.streams[modules[0]] = stream_UD
        return outputs

    def redirect(self, head_map: Callable[[Tensor], Tensor]) -> None:
        """Change the layer's last output so that the stream after it is the mapped one."""
        [name] = MLP_OUTPUT
        self.outputs[name] = head_map(self.streams[name] + self.outputs[name]) - self.streams[name]


class _Fitter:
    """Fits the student's factors, site by site."""

    def __init__(self, teacher: CausalLM, old: Adapter, config: TransplantConfig):
        self._teacher, self._old, self._config = teacher, old, config
        self.factors: dict[str, LoraFactors] = {}
        self.energy: dict[str, float] = {}

    def visitor(self, layer: str, teacher: _Record) -> Visitor:
        """Return the student's visitor for one layer, given what the teacher computed in it."""

        def visit(
            modules: tuple[str, ...], x_UD: Tensor, outputs: list[Tensor], stream_UD: Tensor | None
        ) -> list[Tensor]:
            adapted = [name for name in modules if f"{layer}.{name}" in self._old.factors]
            if not adapted:
                return outputs
            regression = Regression(x_UD, self._config.ridge)
            found = dict(zip(modules, outputs, strict=True))
            for name in adapted:
                y_UF = teacher.outputs[name] - found[name]
                if stream_UD is not None and self._config.match_stream:
                    y_UF = y_UF + (teacher.streams[name] - stream_UD)
                found[name] = found[name] + self._fit(f"{layer}.{name}", regression, y_UF)
            return list(found.values())

        return visit

    def _fit(self, module: str, regression: Regression, y_UF: Tensor) -> Tensor:
        """Fit the module's factors, keep them, and return what they add to its output."""
        like = self._old.factors[module]
        centre_FD = self._old_delta(module).to(y_UF.device) if self._config.centre == "old" else None
        max_rank = min(max(self._config.ranks[0], like.rank), *like.shape)
        min_rank = min(like.rank, *like.shape)
        a_RD, b_FR, self.energy[module] = regression.solve(
            y_UF, max_rank, centre_FD, min_rank=min_rank, energy=self._config.energy
        )
        self.factors[module] = LoraFactors(a_RD.cpu(), b_FR.cpu(), 1.0)
        return (regression.x_UD @ a_RD.T) @ b_FR.T

    def _old_delta(self, module: str) -> Tensor:
        """Return what the old adapter adds to the old weight [F, D], on the CPU."""
        like = self._old.factors[module]
        if like.magnitude_F is None:
            return like.delta()
        weight_FD = self._teacher.get_submodule(module).weight.float().cpu()
        return like.adapted(weight_FD) - weight_FD
