"""Modules of transformers that compute by the kernels of `kernels.py`.

transformers launches many kernels for a norm, a rotary embedding or a router. Modules are
recognized by what they compute: one module of each class is tried on random values, and a kernel is
used only if it gives the same result. Any other module keeps its own code.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from reap2gguf.observing.compute import kernels

_PROBE_WIDTH = 64  # of the random values on which a norm is tried
_PROBE_HEAD = 16  # width of the heads on which attention is tried
_PROBE_LENGTH = 5
_EPS = 1e-3
# what code says that is not of the kind that it looks like
_OTHER_KIND = (TypeError, RuntimeError, AttributeError, ValueError, KeyError, IndexError)
_COMMON = 4  # batches of a shape, for cuDNN to pay: it takes 40 ms for a new one


class Shapes:
    """The shapes (B, T) of a sweep's batches: attention by cuDNN takes a while for a new one."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, int]] = Counter()
        self._preparing: threading.Thread | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype, width: int | None) -> None:
        """Load cuDNN in the background, which takes a second, if heads have this `width`."""
        if width is not None:
            arguments = (device, dtype, width)
            self._preparing = threading.Thread(
                target=kernels.has_cudnn_attention, args=arguments, daemon=True
            )
            self._preparing.start()

    def count(self, tokens: Tensor) -> None:
        """Tokens (B, T) of one batch will go through all layers."""
        self._counts[tokens.shape[0], tokens.shape[1]] += 1

    def wants_cudnn(self, query: Tensor) -> bool:
        """Whether attention of queries (B, T, heads, D) is computed by cuDNN."""
        if self._counts[query.shape[0], query.shape[1]] < _COMMON:
            return False
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        return bool(kernels.has_cudnn_attention(query.device, query.dtype, query.shape[-1]))


def fuse(module: torch.nn.Module, shapes: Shapes) -> None:
    """Let all parts of `module` for which there are kernels compute by them."""
    fuse_norms(module)
    for part in list(module.modules()):
        _fuse_router(part)
        _fuse_attention(part, shapes)
        _fuse_layer(part)


def fuse_norms(module: torch.nn.Module) -> int:
    """Let every RMSNorm in `module` compute by one kernel; the number of them."""
    found = 0
    for part in module.modules():
        norm = _norm_of(part)
        if norm is not None:
            part.forward = partial(_norm, part, norm)
            found += 1
    return found


@dataclass(frozen=True)
class _NormKind:
    """What an RMSNorm adds to the mean of squares and to its weight, and if it takes a gate."""

    eps: float
    offset: float
    gated: bool


def _norm_of(module: Any) -> _NormKind | None:
    recipe = _norm_recipe(type(module))  # type: ignore[arg-type]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # some have no weight, and only divide
    if recipe is None or not isinstance(eps, float) or getattr(module, "weight", None) is None:
        return None
    return _NormKind(eps, *recipe)


def _norm(
    module: Any, kind: _NormKind, hidden_states: Tensor, gate: Tensor | None = None
) -> Tensor:
    return kernels.rms_norm(hidden_states, module.weight, kind.eps, kind.offset, gate)


@contextmanager
def _random(seed: int = 0) -> Iterator[torch.Generator]:
    """A generator for a trial, which leaves no traces: no gradients, torch's seed as it was."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@cache  # one module of each class is tried
def _norm_recipe(kind: type[torch.nn.Module]) -> tuple[float, bool] | None:
    """What an RMSNorm adds to its weight, and whether it takes a gate; None for other modules."""
    if not kind.__name__.replace("Gated", "").endswith("RMSNorm"):
        return None
    gated = "Gated" in kind.__name__
    generator = torch.Generator().manual_seed(0)
    values, weight, gate = torch.randn(3, 5, _PROBE_WIDTH, generator=generator)
    try:
        norm: Any = kind(_PROBE_WIDTH, eps=_EPS)
        norm.weight = torch.nn.Parameter(weight[0], requires_grad=False)
        with torch.inference_mode():
            expected = norm(values, gate) if gated else norm(values)
    except _OTHER_KIND:
        return None  # its arguments are not those of a known norm
    for offset in (0.0, 1.0):
        ours = kernels.rms_norm(values, weight[0], _EPS, offset, gate if gated else None)
        if torch.allclose(ours, expected, rtol=1e-5, atol=1e-6):
            return offset, gated
    return None


def _randomized(module: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """The module with random weights."""
    module = module.to(torch.float32)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    return module.eval()


def _same(ours: Tensor, theirs: Any) -> bool:
    return isinstance(theirs, Tensor) and (
        ours.shape == theirs.shape
        and torch.allclose(ours.float(), theirs.float(), rtol=1e-4, atol=1e-5)
    )


_ROUTERS: dict[tuple[type, bool], bool | None] = {}


def _fuse_router(module: Any) -> None:
    """Softmax, the K largest and their sum, if that is how the module routes."""
    if not type(module).__name__.endswith("TopKRouter"):
        return
    kind = (type(module), bool(getattr(module, "norm_topk_prob", True)))
    if kind not in _ROUTERS:
        _ROUTERS[kind] = _router_recipe(module)
    renormalized = _ROUTERS[kind]
    if renormalized is not None:
        module.forward = partial(_router, module, renormalized)


def _router(module: Any, renormalized: bool, hidden_states: Tensor) -> tuple[Tensor, ...]:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = torch.nn.functional.linear(rows, module.weight)
    return (logits, *kernels.route(logits, module.top_k, renormalized))


def _router_recipe(module: Any) -> bool | None:
    """Whether a router divides its weights by their sum; None if it computes something else."""
    generator = torch.Generator().manual_seed(0)
    trial = copy.copy(module)
    n_experts, width = 12, 16
    hidden = torch.randn(_PROBE_LENGTH, width, generator=generator)
    weight = torch.randn(n_experts, width, generator=generator)
    if list(dict(module.named_parameters())) != ["weight"] or list(module.buffers()):
        return None
    trial._parameters = {"weight": torch.nn.Parameter(weight, requires_grad=False)}
    trial.num_experts, trial.hidden_dim, trial.top_k = n_experts, width, 3
    try:
        with torch.inference_mode():
            expected = type(module).forward(trial, hidden)
            for renormalized in (True, False):
                ours = _router(trial, renormalized, hidden)
                if len(ours) == len(expected) and all(map(_same, ours, expected)):
                    return renormalized
    except _OTHER_KIND:
        return None
    return None


@dataclass(frozen=True)
class _AttentionKind:
    """How attention with norms of queries and keys and rotary embedding is computed."""

    gated: bool  # each head of the query matrix has a gate after its queries
    partly: bool  # the rotary embedding may turn a part of each head


_ATTENTIONS: dict[type, _AttentionKind | None] = {}
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


def _fuse_attention(module: Any, shapes: Shapes) -> None:
    """Norms and rotary embedding of queries and keys, and attention, by one kernel each."""
    parts = dict(module.named_children())
    if set(parts) != {*_MATRICES, "q_norm", "k_norm"} or not hasattr(module, "config"):
        return
    if type(module) not in _ATTENTIONS:
        _ATTENTIONS[type(module)] = _attention_recipe(module)
    kind = _ATTENTIONS[type(module)]
    if kind is not None:
        module.forward = partial(_attention, module, kind, shapes, module.forward)


def _attention(
    module: Any,
    kind: _AttentionKind,
    shapes: Shapes,
    original: Callable[..., tuple[Tensor, Any]],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    if (
        attention_mask is not None
        or position_embeddings is None
        or others.get("cache") is not None
        or others.get("past_key_values") is not None
        or (position_embeddings[0].shape[-1] != module.head_dim and not kind.partly)
    ):
        return original(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **others,
        )
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    query = module.q_proj(hidden_states)
    gate = None
    if kind.gated:
        query, gate = query.view(*shape[:-1], 2 * module.head_dim).chunk(2, dim=-1)
    query = _turned(
        module.q_norm, query.view(shape) if gate is None else query, position_embeddings
    )
    key = _turned(module.k_norm, module.k_proj(hidden_states).view(shape), position_embeddings)
    value = module.v_proj(hidden_states).view(shape)
    by_cudnn = query.is_cuda and shapes.wants_cudnn(query)
    output = kernels.attention(query, key, value, module.scaling, by_cudnn)
    if gate is not None:
        output = kernels.sigmoid_gated(output, gate)
    return module.o_proj(output.flatten(2)), None


def _turned(norm: Any, values: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    kind = _norm_of(norm)
    assert kind is not None
    return kernels.norm_rotary(values, norm.weight, kind.eps, kind.offset, *position_embeddings)


def _attention_recipe(module: Any) -> _AttentionKind | None:
    """How an attention module computes; None if otherwise than `_attention`."""
    if _norm_of(module.q_norm) is None or _norm_of(module.k_norm) is None:
        return None
    config = copy.deepcopy(module.config)
    config.hidden_size, config.head_dim = 3 * _PROBE_HEAD, _PROBE_HEAD
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    shapes = Shapes()
    with _random() as generator:
        try:
            trial: Any = _randomized(type(module)(config, module.layer_idx), generator)
            hidden = torch.randn(2, _PROBE_LENGTH, config.hidden_size, generator=generator)
            turns = _PROBE_HEAD, _PROBE_HEAD // 2
            angles = [torch.randn(2, 1, _PROBE_LENGTH, turn, generator=generator) for turn in turns]
            gated = trial.q_proj.out_features == 8 * _PROBE_HEAD
            kind = _AttentionKind(gated, True)
            right = [
                _is_attention(trial, kind, shapes, hidden, (angle[0], angle[1])) for angle in angles
            ]
        except _OTHER_KIND:
            return None
    return _AttentionKind(gated, right[1]) if right[0] else None


def _is_attention(
    trial: Any, kind: _AttentionKind, shapes: Shapes, hidden: Tensor, angles: tuple[Tensor, Tensor]
) -> bool:
    arguments: dict[str, Any] = {"position_embeddings": angles, "attention_mask": None}
    try:
        expected = trial(hidden_states=hidden, **arguments)
    except _OTHER_KIND:
        return False
    return _same(
        _attention(trial, kind, shapes, trial.forward, hidden, **arguments)[0], expected[0]
    )


_MIXERS = ("self_attn", "linear_attn")
# by class, mixer and names of arguments: the arguments that the mixer gets, None if not fused
_LAYERS: dict[tuple[type, str, tuple[str, ...]], tuple[str, ...] | None] = {}


def _fuse_layer(module: Any) -> None:
    """The first sum and the second norm of a layer of two residual blocks by one kernel."""
    parts = dict(module.named_children())
    mixers = set(parts) & set(_MIXERS)
    others = {"mlp", "input_layernorm", "post_attention_layernorm"}
    if len(mixers) != 1 or set(parts) != others | mixers:
        return
    norm = _norm_of(parts["post_attention_layernorm"])
    if norm is not None and not norm.gated:
        module.forward = partial(_layer, module, module.forward, mixers.pop(), norm)


def _layer(
    module: Any,
    original: Callable[..., Tensor],
    mixer: str,
    norm: _NormKind,
    hidden_states: Tensor,
    **arguments: Any,
) -> Tensor:
    """A layer's output, if it is what `_layer_recipe` expects; else by the layer's own code."""
    kind = (type(module), mixer, tuple(sorted(arguments)))
    if kind not in _LAYERS:
        _LAYERS[kind] = _layer_recipe(module, mixer, arguments)
    names = _LAYERS[kind]
    if names is None:
        return original(hidden_states, **arguments)
    normed = module.input_layernorm(hidden_states)
    chosen = {name: arguments[name] for name in names}
    mixed = _first(getattr(module, mixer)(hidden_states=normed, **chosen))
    weight = module.post_attention_layernorm.weight
    total, normed = kernels.add_rms_norm(mixed, hidden_states, weight, norm.eps, norm.offset)
    return total + _first(module.mlp(normed))


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _StandIn(torch.nn.Module):
    """A part of a layer on trial: computes something simple, and notes what it is called with."""

    def __init__(self, factor: float, as_pair: bool) -> None:
        super().__init__()
        self._factor, self._as_pair = factor, as_pair
        self.seen: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Any:
        self.seen = arguments
        output = torch.sin(hidden_states * self._factor)
        return (output, None) if self._as_pair else output


def _layer_recipe(module: Any, mixer: str, arguments: dict[str, Any]) -> tuple[str, ...] | None:
    """Which arguments a layer gives to its mixer; None if it computes otherwise than `_layer`.

    The layer's own code runs on stand-ins for its parts.
    """
    marks = {name: object() for name in arguments}
    mixing = _StandIn(3.0, as_pair=mixer == "self_attn")
    feeding = _StandIn(5.0, as_pair=False)
    before, after = _StandIn(7.0, as_pair=False), _StandIn(11.0, as_pair=False)
    trial = copy.copy(module)
    trial._modules = {
        mixer: mixing,
        "mlp": feeding,
        "input_layernorm": before,
        "post_attention_layernorm": after,
    }
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, _PROBE_LENGTH, 8, generator=generator)
    try:
        with torch.inference_mode():
            found = type(module).forward(trial, hidden, **marks)
            middle = hidden + torch.sin(before(hidden) * 3.0)
            expected = middle + feeding(after(middle))
    except _OTHER_KIND:
        return None
    names = {name for name, mark in marks.items() if any(mark is v for v in mixing.seen.values())}
    given = {name: mark for name, mark in mixing.seen.items() if mark is not None}
    if given != {name: marks[name] for name in names} or not _same(expected, _first(found)):
        return None
    return tuple(sorted(names))


_GATES: dict[tuple[type, type], bool] = {}  # one module of each class is tried


def is_swiglu(experts: Any) -> bool:
    """Whether an experts module computes silu(gate) * up, with the gates first, and no more.

    Experts with biases, or with matrices (E, in, out), do not; gpt-oss has both, and cuts gates.
    """
    if getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False):
        return False
    kind = (type(experts), type(experts.act_fn))
    if kind not in _GATES:
        gate_up = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        ours, _ = kernels.swiglu(gate_up, torch.tensor([3], dtype=torch.int32))
        _GATES[kind] = torch.allclose(experts._apply_gate(gate_up), ours, atol=1e-6)
    return _GATES[kind]
