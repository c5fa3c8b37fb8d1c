"""How much a model's answers suffer from errors in each kind of tensor, measured on this model.

Each probe quantizes one kind of tensor in one band of neighbouring layers to a type of few bits and
back, as an export with the importance matrix would, and leaves all others as they are. The KL
divergence of the whole model from its source, over the relative errors of these tensors, is the
weight of the probe's tensors, in place of that of their kind in `sensitivity.py`. All probes go
through the layers together, on a few rows of text.

A multi-token-prediction block takes no part in the answers: its tensors keep the weights of their
kinds. So do tensors whose rows no such type fits.

Time: that of an evaluation of as many variants as there are probes, and all weights are quantized
once. Memory: that of the evaluation (`evaluating/engine.py`); of each probe, the tensors of one
layer that it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as Type

from reap2gguf.evaluating.figures import divergence
from reap2gguf.evaluating.variants import Variant
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting.perturbed import Perturbing
from reap2gguf.fitting.rules import layer_globs
from reap2gguf.fitting.sensitivity import kind_of, sensitivities
from reap2gguf.models.gguf_keys import block_of
from reap2gguf.quantizing.quantizer import load_quantizer

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.evaluating.scores import Pair, Scores
    from reap2gguf.fitting.errors_table import Cache, Errors
    from reap2gguf.fitting.fitted import Problem
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.progress import Progress

BANDS = 4
PROBE_TYPES = (Type.Q3_K, Type.Q4_0)  # the first that a tensor's rows fit
_SOURCE = "source"
_MEAN, _ERROR = "mean", "error"

# what variants give, and how far pairs of their names are apart
Evaluates = Callable[[Sequence[Variant], Sequence["Pair"]], "Scores"]


@dataclass(frozen=True)
class ProbedText:
    """A text, and what evaluates variants on it."""

    sha256: str  # of its tokens
    evaluate: Evaluates


@dataclass(frozen=True)
class Probe:
    """Tensors that are quantized together."""

    name: str
    types: Mapping[str, Type]  # by tensor


def probes_of(problem: Problem, facts: ModelFacts) -> list[Probe]:
    """One probe for each kind of tensor that has a choice of types, in each band of layers."""
    found: dict[tuple[str, int], dict[str, Type]] = {}
    for tensor in problem.to_measure():
        layer = block_of(tensor.name)
        fitting = problem.types_for(tensor, PROBE_TYPES)
        if not fitting or (layer is not None and layer >= facts.n_layers):
            continue
        if tensor.is_copied_as(fitting[0]):
            continue  # it has no smaller type, and that one loses nothing
        band = -1 if layer is None else layer * BANDS // facts.n_layers
        found.setdefault((kind_of(tensor.name), band), {})[tensor.name] = fitting[0]
    return [Probe(_name(kind, types), types) for (kind, _), types in found.items()]


def _name(kind: str, tensors: Iterable[str]) -> str:
    """What a probe is called: by all of its tensors, since another choice of types may have fewer
    of a kind, and what was kept is found by name."""
    layers = [layer for layer in map(block_of, tensors) if layer is not None]
    return f"{kind} in layers {', '.join(layer_globs(layers))}" if layers else kind


@dataclass(frozen=True)
class Probing:
    """What is measured, on what, and where it is kept."""

    weights: Weights
    model: MoeModel
    imatrix: Imatrix
    text: ProbedText
    cache: Cache | None = None

    def sensitivities(
        self, problem: Problem, errors: Errors, progress: Progress
    ) -> dict[str, float]:
        """The weight of each tensor's relative error.

        Raises what `text.evaluate` raises, and OutputError if the cache cannot be written.
        """
        probes = probes_of(problem, self.model.facts)
        known = {} if self.cache is None else dict(self.cache.load(progress.note))
        if missing := [one for one in probes if one.name not in known]:
            known |= self._measured(missing)
            if self.cache is not None:
                self.cache.save(known)
        weights = sensitivities(tensor.name for tensor in problem.free)
        for probe in probes:
            found = known[probe.name]
            lost = sum(errors[name][one.name] for name, one in probe.types.items())
            # a divergence within its error of 0 is no reason to give the tensors no bits at all
            damage = max(found[_MEAN], found[_ERROR])
            if lost > 0 and damage > 0:
                weights |= dict.fromkeys(probe.types, damage / lost)
        return weights

    def _measured(self, probes: Sequence[Probe]) -> dict[str, dict[str, float]]:
        """The KL divergence of each probe, and its standard error."""
        # nothing is written of what is quantized here: it needs no comparison with libggml
        host = BlockMaker(self.weights, load_quantizer(0), self.imatrix.entries)
        perturbing = Perturbing(host, self.model)
        variants = [Variant(_SOURCE, "source", self.weights, self.model, 0, 16.0)]
        for probe in probes:
            view = perturbing.with_types(probe.types)
            variants.append(Variant(probe.name, "pruned", view, view.model, 0, 16.0))
        pairs = [(_SOURCE, probe.name) for probe in probes]
        scores = self.text.evaluate(variants, pairs)
        found = {}
        for pair in pairs:
            mean = divergence(scores.pair(*pair)).mean
            found[pair[1]] = {_MEAN: max(mean.value, 0.0), _ERROR: mean.error}
        return found
