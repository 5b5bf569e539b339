"""Functional transplant: an adapter that makes the new base do what the old service did, in closed form.

Fusing in weight space spends the adapter's few ranks on the base's whole change. A service needs less: on its task's
inputs the new base with the new adapter (the student) should compute what the old base with the old adapter (the
teacher) computed. Module by module this is linear least squares; it needs no labels, no gradients and no steps.

Both models go through the calibration rows layer by layer. At each site (q/k/v, then o, then gate/up, then down):

    x_ND   inputs of the site's modules in the student, all earlier modules already adapted; one row a token
    y_NF   what the adapter has to add: the teacher's output minus the student's; at o and down, which write into the
           residual stream, also the teacher's stream minus the student's, so that what embeddings and earlier cuts
           left wrong is mended on the way
    D      = argmin |X D^T - Y|^2 + mu |D - D0|^2, D0 the old adapter's delta, mu = ridge x mean diagonal of X^T X;
           one Cholesky solve of the Gram matrix G = X^T X + mu I for all modules of the site
           (of a DoRA, D0 is all that it makes of the old weight, less that weight)
    B, A   the best D of rank R in the metric of the outputs: with G = C C^T and U the left singular vectors of D C,
           B = U_R, A = U_R^T D (reduced-rank regression: Izenman, J. Multivariate Analysis 1975); R is the least that
           holds a given share of the energy |D C|^2

The adapter is installed before the student goes on: later modules see, and mend, what earlier cuts lost. The stream
that leaves the last layer is read by the new head, not by the old one: what is asked of it there is the stream from
which the new head computes the logits that the old one computed from the teacher's (`HeadMap`).
Shape letters: N tokens of all rows without padding, B rows, T tokens of a row, D in, F out, R rank, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cluster.adapter_files import Adapter, LoraFactors
from cluster.config import TransplantConfig
from cluster.errors import InvalidCheckpointError, TrainingError
from readapt.lowrank.spectra import EnergyShare
from readapt.lowrank.svd import decompose
from readapt.training.data import IGNORED, BatchTensors, Encoded, by_length, collate
from readapt.training.lora import attached

BATCH_ROWS = 32
HEAD_RIDGE = 1e-3  # from 1e-4 to 1e-2 it made no difference
MAX_PENALTIES = 4  # tried, each ten times the one before, until the Gram matrix can be factored
BALANCE_FLOOR = 1e-4  # of the length of A's rows, so that B's columns can be trained where there was nothing to add
WALK_ROWS, WALK_TOLERANCE = 2, 1e-3
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = ("self_attn.o_proj",)
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = ("mlp.down_proj",)

# Called at each site with its modules' names in the layer, their inputs, their outputs and, where these are added to
# it, the residual stream; returns the outputs to go on with.
Visit = Callable[[tuple[str, ...], Tensor, list[Tensor], Tensor | None], list[Tensor]]


@dataclass(frozen=True)
class Transplant:
    """The new adapter (scaling 1) and, by module, the share of the regression's energy that its rank holds."""

    adapter: Adapter
    energy: dict[str, float]


@torch.no_grad()
def transplant(
    teacher: Any, old: Adapter, student: Any, rows: Sequence[Encoded], config: TransplantConfig
) -> Transplant:
    """Adapts `student` to do what `teacher` with the adapter `old` does on `rows`; both models come and go bare.

    The result adapts the modules of `old`, each at the smallest rank that holds `config.energy` of its map, from its
    old rank up to `config.ranks[0]` (or the old one if that is higher). Memory: one layer's activations on all rows.
    Works on decoders of the Llama family (as `serving.model` does), whatever the two models' vocabularies, as long as
    both read the rows' tokens; InvalidCheckpointError for others. TrainingError where what they compute is not finite.
    """
    check_walk(teacher, rows[:WALK_ROWS])
    check_walk(student, rows[:WALK_ROWS])
    if len(teacher.base_model.layers) != len(student.base_model.layers):
        raise InvalidCheckpointError("a transplant needs two models of as many layers")
    batches = [collate(rows[start : start + BATCH_ROWS]) for start in _starts(rows)]
    fitter = _Fitter(teacher, old, config)
    with attached(teacher, old):
        streams = _Stream(teacher, batches), _Stream(student, batches)
        for index, layers in enumerate(zip(teacher.base_model.layers, student.base_model.layers, strict=True)):
            record = _Record()
            streams[0].advance(layers[0], record.visit)
            if config.map_head and layers[0] is teacher.base_model.layers[-1]:
                record.redirect(HeadMap(teacher, student, _answers(batches)))
            streams[1].advance(layers[1], fitter.visit(f"model.layers.{index}", record))
    return Transplant(Adapter(fitter.factors, base_model=old.base_model), fitter.energy)


@torch.no_grad()
def check_walk(model: Any, rows: Sequence[Encoded]) -> None:
    """InvalidCheckpointError where the first layer, taken site by site, does not compute what it does by itself."""
    try:
        batch, layer = collate(rows), model.base_model.layers[0]
        embedded_BTD, settings = _first_layer_call(model, batch)
        own = layer(embedded_BTD, **settings)
        stream = _Stream(model, [batch])
        stream.advance(layer, lambda modules, x_ND, outputs, stream_ND: outputs)
    except AttributeError as error:
        raise InvalidCheckpointError(f"no decoder of the Llama family, which a transplant needs: {error}") from error
    own_BTD = own[0] if isinstance(own, tuple) else own
    own_ND = own_BTD[batch.attention_mask_BT.bool().to(own_BTD.device)]
    if not (stream.hidden_ND - own_ND).norm() <= WALK_TOLERANCE * own_ND.norm():
        raise InvalidCheckpointError("no decoder of the Llama family, which a transplant needs: its layers differ")


def calibration_rows(rows: Iterable[Encoded], vocabulary: int, num_tokens: int) -> list[Encoded]:
    """The first rows that come to so many tokens, by rising length, of those that a base of so many tokens can read.

    A row whose end-of-sequence is all that the base lacks counts without it.
    """
    chosen: list[Encoded] = []
    for row in rows:
        if row.input_ids[-1] >= vocabulary:  # eos is the last token
            row = replace(row, input_ids=row.input_ids[:-1])
        if max(row.input_ids) < vocabulary:
            chosen.append(row)
            num_tokens -= len(row.input_ids)
        if num_tokens <= 0:
            break
    return by_length(chosen)


def _starts(rows: Sequence[Encoded]) -> range:
    return range(0, len(rows), BATCH_ROWS)


def _answers(batches: Sequence[BatchTensors]) -> Tensor:
    """All tokens that are to be predicted, one after the other."""
    return torch.cat([batch.labels_BT[batch.labels_BT != IGNORED] for batch in batches])


class HeadMap:
    """Turns the teacher's last stream into the one from which the student's norm and head compute the same logits.

    Least squares over the vocabulary, half of the weight on the tokens that the task answers with, and a penalty on
    what differs from the identity, so that equal heads map a stream to itself. The gain of each RMS norm is counted to
    its head, whose columns it scales; the length of the stream is left as it is, for neither head sees it. Tokens that
    only one of the two has do not count.
    """

    def __init__(self, teacher: Any, student: Any, answers_L: Tensor):
        old_VD, new_VD = _head(teacher), _head(student)
        num_shared = min(len(old_VD), len(new_VD))
        old_VD, new_VD = old_VD[:num_shared], new_VD[:num_shared]
        counts_V = answers_L[answers_L < num_shared].bincount(minlength=num_shared).to(new_VD)
        weights_V = 0.5 / num_shared + 0.5 * counts_V / counts_V.sum().clamp_min(1)
        weighted_DV = (new_VD * weights_V[:, None]).T
        gram_DD = (weighted_DV @ new_VD).double()
        scales_D = gram_DD.diagonal()  # squares of the new gains are in it: the penalty goes with them, but never to 0
        penalty_DD = HEAD_RIDGE * scales_D.clamp_min(HEAD_RIDGE * scales_D.mean()).diag()
        moment_DD = (weighted_DV @ old_VD).double() + penalty_DD
        self._map_DD = torch.linalg.solve(gram_DD + penalty_DD, moment_DD).float()

    def __call__(self, stream_ND: Tensor) -> Tensor:
        """The stream to ask of the student."""
        return stream_ND @ self._map_DD.T


def _head(model: Any) -> Tensor:
    """The map from a stream of unit mean square to the logits, V x D."""
    head_VD: Tensor = model.get_output_embeddings().weight.float()
    return head_VD * model.base_model.norm.weight.float()


class _Stream:
    """One model's residual stream on the calibration rows, taken from layer to layer; padded for attention only."""

    def __init__(self, model: Any, batches: Sequence[BatchTensors]):
        self._device = model.device
        self._is_token = [batch.attention_mask_BT.bool().to(model.device) for batch in batches]
        calls = [_first_layer_call(model, batch) for batch in batches]
        self._settings = [settings for _, settings in calls]
        self.hidden_ND = torch.cat([h[kept] for (h, _), kept in zip(calls, self._is_token, strict=True)])

    def advance(self, layer: Any, visit: Visit) -> None:
        """Takes the stream through one decoder layer, with `visit` at its four sites."""
        stream_ND = self.hidden_ND
        x_ND = layer.input_layernorm(stream_ND)
        qkv = visit(ATTENTION_INPUTS, x_ND, _outputs(layer, ATTENTION_INPUTS, x_ND), None)
        mixed_ND, added_ND = self._attend(layer.self_attn, x_ND, qkv)
        [added_ND] = visit(ATTENTION_OUTPUT, mixed_ND, [added_ND], stream_ND)
        stream_ND = stream_ND + added_ND
        x_ND = layer.post_attention_layernorm(stream_ND)
        gate_ND, up_ND = visit(MLP_INPUTS, x_ND, _outputs(layer, MLP_INPUTS, x_ND), None)
        inner_ND = layer.mlp.act_fn(gate_ND) * up_ND
        [added_ND] = visit(MLP_OUTPUT, inner_ND, _outputs(layer, MLP_OUTPUT, inner_ND), stream_ND)
        self.hidden_ND = stream_ND + added_ND

    def _attend(self, attention: Any, x_ND: Tensor, qkv: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Input and output of o_proj, given what q, k and v shall be."""
        mixed, added = [], []
        for is_token_BT, settings, x_BTD, *heads in zip(
            self._is_token, self._settings, self._padded(x_ND), *map(self._padded, qkv), strict=True
        ):
            with _replaced(attention, heads) as seen:
                y_BTD = attention(hidden_states=x_BTD, **settings)[0]
            mixed.append(seen[0][is_token_BT])
            added.append(y_BTD[is_token_BT])
        return torch.cat(mixed), torch.cat(added)

    def _padded(self, x_ND: Tensor) -> Iterator[Tensor]:
        pieces = x_ND.split([int(is_token_BT.sum()) for is_token_BT in self._is_token])
        for is_token_BT, piece_ND in zip(self._is_token, pieces, strict=True):
            x_BTD = piece_ND.new_zeros(*is_token_BT.shape, x_ND.shape[1])
            x_BTD[is_token_BT] = piece_ND
            yield x_BTD


class _Given(nn.Module):
    """Stands in for a linear whose output is known: a hook on it would let it compute what nobody wants."""

    def __init__(self, y_BTF: Tensor):
        super().__init__()
        self._y_BTF = y_BTF

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._y_BTF


@contextmanager
def _replaced(attention: Any, heads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within it q, k and v of an attention have the given outputs; yields a list that o_proj's input goes into."""
    names = ("q_proj", "k_proj", "v_proj")
    linears = [getattr(attention, name) for name in names]
    seen: list[Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        for name, y_BTF in zip(names, heads, strict=True):
            setattr(attention, name, _Given(y_BTF))
        yield seen
    finally:
        handle.remove()
        for name, linear in zip(names, linears, strict=True):
            setattr(attention, name, linear)


def _outputs(layer: Any, modules: Sequence[str], x_ND: Tensor) -> list[Tensor]:
    """Outputs of some linears of a layer, with whatever adapter is on them."""
    return [layer.get_submodule(name)(x_ND[None])[0] for name in modules]


class _FirstLayerReached(Exception):  # noqa: N818 (not an error: it ends a forward pass that has done its work)
    pass


def _first_layer_call(model: Any, batch: BatchTensors) -> tuple[Tensor, dict[str, Any]]:
    """What the first decoder layer is called with: embeddings [B, T, D], and masks and rotary tables by keyword.

    All layers are called with the same, but for sliding windows that no calibration row is long enough to feel.
    """
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(layer: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        found.append((positional[0] if positional else named.pop("hidden_states"), named))
        raise _FirstLayerReached

    handle = model.base_model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    inputs, mask = batch.input_ids_BT.to(model.device), batch.attention_mask_BT.to(model.device)
    try:
        model.base_model(input_ids=inputs, attention_mask=mask, use_cache=False)
    except _FirstLayerReached:
        pass
    finally:
        handle.remove()
    return found[0]


class _Record:
    """What the teacher computed in one layer: each module's output, and the stream it was added to."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}

    def visit(
        self, modules: tuple[str, ...], x_ND: Tensor, outputs: list[Tensor], stream_ND: Tensor | None
    ) -> list[Tensor]:
        self.outputs |= dict(zip(modules, outputs, strict=True))
        if stream_ND is not None:
            self.streams[modules[0]] = stream_ND
        return outputs

    def redirect(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Makes what the layer left to the stream what it would have been, had it left `turn` of it."""
        [name] = MLP_OUTPUT
        self.outputs[name] = turn(self.streams[name] + self.outputs[name]) - self.streams[name]


class _Fitter:
    """Finds the student's factors site by site."""

    def __init__(self, teacher: Any, old: Adapter, config: TransplantConfig):
        self._teacher, self._old, self._config = teacher, old, config
        self.factors: dict[str, LoraFactors] = {}
        self.energy: dict[str, float] = {}

    def visit(self, layer: str, teacher: _Record) -> Visit:
        """The student's visitor of one layer, whose teacher has been there already."""

        def visit(
            modules: tuple[str, ...], x_ND: Tensor, outputs: list[Tensor], stream_ND: Tensor | None
        ) -> list[Tensor]:
            adapted = [name for name in modules if f"{layer}.{name}" in self._old.factors]
            if not adapted:
                return outputs
            regression = Regression(x_ND, self._config.ridge)
            found = dict(zip(modules, outputs, strict=True))
            for name in adapted:
                y_NF = teacher.outputs[name] - found[name]
                if stream_ND is not None and self._config.match_stream:
                    y_NF = y_NF + (teacher.streams[name] - stream_ND)
                found[name] = found[name] + self._fit(f"{layer}.{name}", regression, y_NF)
            return list(found.values())

        return visit

    def _fit(self, module: str, regression: "Regression", y_NF: Tensor) -> Tensor:
        """Keeps the module's factors and returns what they add."""
        like = self._old.factors[module]
        centre_FD = self._centre(module).to(y_NF.device) if self._config.centre == "old" else None
        most, least = (min(rank, *like.shape) for rank in (max(self._config.ranks[0], like.rank), like.rank))
        found = regression.solve(y_NF, most, centre_FD, min_rank=least, energy=self._config.energy)
        a_RD, b_FR, self.energy[module] = found
        self.factors[module] = LoraFactors(a_RD.cpu(), b_FR.cpu(), 1.0)
        return (regression.x_ND @ a_RD.T) @ b_FR.T

    def _centre(self, module: str) -> Tensor:
        """All that the old adapter adds to the old weight, F x D on the CPU."""
        like = self._old.factors[module]
        if like.magnitude_F is None:
            return like.delta()
        weight_FD = self._teacher.get_submodule(module).weight.float().cpu()
        return like.adapted(weight_FD) - weight_FD


class Regression:
    """Ridge regression on the inputs x_ND, its Gram matrix factored once for all outputs.

    The penalty is `ridge` times the mean diagonal of the Gram matrix, more where that cannot be factored; TrainingError
    where nothing helps, for the inputs are not finite.
    """

    def __init__(self, x_ND: Tensor, ridge: float):
        self.x_ND = x_ND
        gram_DD = (x_ND.T @ x_ND).double()
        least = ridge * gram_DD.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        self._penalty, self._cholesky_DD = _factored(gram_DD, least)

    def solve(
        self,
        y_NF: Tensor,
        max_rank: int,
        centre_FD: Tensor | None = None,
        *,
        min_rank: int = 1,
        energy: float = 1.0,
    ) -> tuple[Tensor, Tensor, float]:
        """Factors (a_RD, b_FR) of the best map, and the share of the full map's energy that they hold.

        The rank is the smallest that holds a share of `energy`, between the two. The penalty pulls the full map to
        `centre_FD` (None: to zero). The factors are balanced, as training wants them.
        """
        moment_DF = (self.x_ND.T @ y_NF).double()
        if centre_FD is not None:
            moment_DF += self._penalty * centre_FD.T
        full_FD = torch.cholesky_solve(moment_DF, self._cholesky_DD).T.float()
        if not full_FD.isfinite().all():
            raise TrainingError("the transplant meets values that are not finite")
        found = decompose(full_FD @ self._cholesky_DD.float(), max_rank)
        rank = max(min_rank, EnergyShare(energy).rank(found.spectrum()))
        b_FR = found.u_FR[:, :rank]
        a_RD = b_FR.T @ full_FD
        balance_R = torch.linalg.vector_norm(a_RD, dim=1).clamp_min(BALANCE_FLOOR).sqrt()
        return a_RD / balance_R[:, None], b_FR * balance_R, found.spectrum().energy(rank)


def _factored(gram_DD: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The first penalty with which it can be done, from `least` on, and the Cholesky factor of the matrix with it."""
    for penalty in (least * 10**power for power in range(MAX_PENALTIES)):
        ridged_DD = gram_DD.clone()
        ridged_DD.diagonal().add_(penalty)
        cholesky_DD, failed_at = torch.linalg.cholesky_ex(ridged_DD)
        if not failed_at and cholesky_DD.isfinite().all():
            return penalty, cholesky_DD
    raise TrainingError("the transplant's Gram matrix cannot be factored: the inputs are not finite")
