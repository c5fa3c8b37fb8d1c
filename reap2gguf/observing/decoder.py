"""A model whose weights are on disk: only one decoder layer has them in memory.

transformers builds the whole model on the meta device, where it takes no memory. A layer gets its
weights, runs, and gives them up; meanwhile those of the next layer are read. What a layer is called
with besides the hidden states (rotary embeddings, masks) is recorded from the model's own forward,
so every architecture behaves as its authors wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reap2gguf.checkpoint.weights import first_not_finite
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.loading import text_model
from reap2gguf.observing.compute.by_device import follow_devices
from reap2gguf.observing.compute.convolution import fuse_convolutions
from reap2gguf.observing.compute.crew import Crew
from reap2gguf.observing.compute.delta_attention import save_memory
from reap2gguf.observing.compute.experts import IMPLEMENTATION, register
from reap2gguf.observing.compute.fused import Shapes, fuse
from reap2gguf.observing.compute.kernels import has_triton
from reap2gguf.observing.linear_attention import has_linear_attention
from reap2gguf.observing.loader import Target, Tensors, WeightLoader, target_bytes
from reap2gguf.observing.mtp import build_mtp, next_tokens
from reap2gguf.observing.readers import Readers
from reap2gguf.observing.recording import Arguments, Recorded, Recorder, unshared
from reap2gguf.observing.targets import layer_targets, names_by_layer, whole

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.observing.compute.ranks import HostPeers

_READERS = {"cpu": 2, "cuda": 8}
_HEAD_TOKENS = 256  # 250 MB of float32 logits at a vocabulary of a quarter million


class SharedThreads:
    """Threads of one decoder, or of several that run one after another."""

    def __init__(self, device: torch.device, n_threads: int) -> None:
        self.crew = Crew(n_threads) if device.type == "cpu" else None
        self.readers = Readers(device, _READERS[device.type])

    def close(self) -> None:
        """End the threads."""
        self.readers.close()
        if self.crew is not None:
            self.crew.close()


class StreamedDecoder:
    """The decoder layers of a model: one in memory, and one that is being read."""

    def __init__(
        self,
        weights: Weights,
        model: MoeModel,
        dtype: torch.dtype,
        device: torch.device,
        n_threads: int = 1,
        peers: HostPeers | None = None,
        shared: SharedThreads | None = None,
    ) -> None:
        """`shared`: threads of several decoders; None for threads of its own."""
        self.weights = weights
        self.model = model
        self._dtype = dtype
        self._device = device
        self._base = _build(weights, dtype)
        self._norm = self._base.get_submodule(model.norm_module)
        trunk = list(self._base.layers)
        self._layers: list[torch.nn.Module] = [*trunk, *self._mtp_block(trunk)]
        if device.type == "cpu":
            follow_devices(part for layer in self._layers for part in layer.modules())
        save_memory(part for layer in self._layers for part in layer.modules())
        self._recorders = [Recorder(layer, is_last=layer is trunk[-1]) for layer in trunk]
        self._base.layers = torch.nn.ModuleList(self._recorders)
        _build_rotary(self._base, device)
        self._arguments: dict[int, list[Arguments]] = {}  # by row length
        self._head: Tensor | None = None  # read when an MTP block is asked for its predictions
        # before anything is computed, because a crew sets the number of torch's threads
        self._closes_threads = shared is None
        self._threads = shared or SharedThreads(device, n_threads)
        self.crew = self._threads.crew
        self.loader = WeightLoader(weights, device, self._threads.readers, peers)
        self._names = names_by_layer(weights.tensors, model)
        self._found_targets: dict[int, dict[str, Target]] = {}
        self._shapes = Shapes()
        if has_triton(device):
            self._fuse()

    def _mtp_block(self, trunk: list[torch.nn.Module]) -> Iterator[torch.nn.Module]:
        """The block that predicts the token after the next one, if the model has one."""
        model, config = self.model, self._base.config
        if model.facts.has_mtp:
            templates, centers = model.mtp_templates(), model.mtp_centers
            yield build_mtp(config, trunk, templates, self._norm, centers, self._dtype)

    def _fuse(self) -> None:
        """Put kernels of several operations in place of those of the layers that have them."""
        # from the values themselves: asked for one that differs among layers, a config raises
        width = vars(self._base.config).get("head_dim")
        self._shapes.prepare(self._device, self._dtype, width)
        for layer in (*self._layers, self._norm):
            fuse(layer, self._shapes)
        fuse_convolutions(part for layer in self._layers for part in layer.modules())

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the hidden states."""
        return self._dtype

    @property
    def n_threads(self) -> int:
        """Threads that compute; 1 for a GPU."""
        return 1 if self.crew is None else self.crew.n_threads

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The stored tensors, by name."""
        return self.weights.tensors

    @property
    def has_linear_attention(self) -> bool:
        """Whether any layer's attention is a Gated DeltaNet, or Kimi Delta Attention."""
        return has_linear_attention(self.weights.tensors)

    @property
    def mtp_layer(self) -> int | None:
        """The MTP block's number among the layers, if there is one."""
        return self.model.facts.mtp_layer

    def load_embedding(self) -> None:
        """Read the token embedding."""
        self._load_embedding(self.model.embedding_name)

    def _load_embedding(self, name: str) -> None:
        weight = self._read(name, shared=True)
        embedding = self._embedding
        embedding.load_state_dict({"weight": weight}, assign=True)
        # a buffer that is not stored, by which some models multiply embeddings
        if (scale := getattr(embedding, "embed_scale", None)) is not None:
            factor = embedding.scalar_embed_scale
            embedding.embed_scale = torch.full_like(scale, factor, device=self._device)

    def drop_embedding(self) -> None:
        """Free the token embedding."""
        self._embedding.to("meta")

    @property
    def _embedding(self) -> Any:
        """The token embedding's module, whatever its name is."""
        return self._base.get_input_embeddings()

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, T, H) that enter the first layer, for tokens (B, T)."""
        self.record(tokens)
        return self._record(tokens.to(self._device))

    def record(self, tokens: Tensor) -> None:
        """Record what layers are called with, besides hidden states, for a batch (B, T)."""
        self._shapes.count(tokens)
        if tokens.shape[1] not in self._arguments:
            # these arguments depend only on the length of the rows, and those of one row
            # broadcast over any batch
            self._record(tokens[:1].to(self._device))
            self._arguments[tokens.shape[1]] = [r.arguments for r in self._recorders]

    def _record(self, tokens: Tensor) -> Tensor:
        try:
            self._base(input_ids=tokens, use_cache=False)
        except Recorded:
            hidden = self._recorders[0].hidden
        assert hidden is not None
        return hidden

    def embedding_bytes(self) -> int:
        """Memory of the token embedding, and of the head."""
        stored = self.weights.tensors[self.model.embedding_name]
        return stored.n_elements * self._dtype.itemsize

    def layer_bytes(self, index: int) -> int:
        """Memory of layer `index`, whatever type its weights are stored in."""
        return target_bytes(self.targets(index))

    def ask_layer(self, index: int) -> None:
        """Begin to read the weights of layer `index`, if there is one."""
        if index < len(self._layers):
            self.loader.ask(f"layer {index}", self.targets(index), shared=True)

    def complete_layer(self, index: int) -> None:
        """Wait until layer `index`, if it was asked for, is read; a GPU computes meanwhile."""
        self.loader.complete(f"layer {index}")

    def fetch_layer(self, index: int) -> None:
        """Begin to download what a layer needs, if it is still on the Hub."""
        targets = self.targets(index).values()
        self.weights.fetch_ahead({run.stored for target in targets for run in target.runs})

    def load_layer(self, index: int) -> torch.nn.Module:
        """Give layer `index` its weights; CheckpointError if they do not fit it."""
        key = f"layer {index}"
        if not self.loader.has(key):
            self.ask_layer(index)
        return self.place_layer(index, self.loader.take(key))

    def place_layer(self, index: int, tensors: Tensors) -> torch.nn.Module:
        """Give layer `index` weights that are in memory; CheckpointError if they do not fit it."""
        layer = self._layers[index]
        try:
            layer.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            problem = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.weights.shown}: layer {index} does not fit the model: {problem}"
            ) from error
        return layer

    def layer_shapes(self, index: int) -> dict[str, torch.Size]:
        """The shapes of layer `index`'s weights, under the names of its module."""
        return {name: value.shape for name, value in self.layer_tensors(index).items()}

    def layer_tensors(self, index: int) -> Tensors:
        """The weights of layer `index`, under the names of its module."""
        return dict(self._layers[index].state_dict())

    def replace_layer(self, index: int, layer: torch.nn.Module) -> None:
        """Run another module as layer `index`, such as one with fewer experts."""
        self._layers[index] = layer

    def has_layer(self, index: int) -> bool:
        """Whether layer `index` was asked for and not yet loaded."""
        return self.loader.has(f"layer {index}")

    def drop_layer(self, index: int) -> None:
        """Free the weights of layer `index`."""
        self._layers[index].to("meta")

    def first_of_each_kind(self, layers: range) -> list[int]:
        """The first of these layers of each kind, such as one with linear attention; no MTP."""
        found: dict[tuple[str, ...], int] = {}
        for index in layers:
            if index != self.mtp_layer:
                kind = tuple(type(part).__name__ for part in self._layers[index].modules())
                found.setdefault(kind, index)
        return list(found.values())

    @contextmanager
    def zeros_in(self, index: int) -> Iterator[torch.nn.Module]:
        """Layer `index` with weights of zero, which it gives up again."""
        layer = self._layers[index]
        zeros = {
            name: torch.zeros(value.shape, dtype=value.dtype, device=self._device)
            for name, value in layer.state_dict().items()
        }
        try:
            layer.load_state_dict(zeros, assign=True)
            yield layer
        finally:
            self.drop_layer(index)

    @torch.inference_mode()
    def run_layer(self, index: int, hidden: Tensor, layer: torch.nn.Module | None = None) -> Tensor:
        """Layer `index` on hidden states (B, T, H), for a T that was embedded or recorded.

        `layer`: another module in its place, such as the same layer of a larger model.
        """
        arguments, module = self._arguments[hidden.shape[1]][index], layer or self._layers[index]
        return self.by_rows(lambda rows: _call_layer(module, hidden[rows], arguments), hidden)

    def by_rows(self, function: Callable[[slice], Tensor], hidden: Tensor) -> Tensor:
        """`function` of slices of the rows of hidden states (B, T, H), joined."""
        if self.crew is None:
            return function(slice(None))
        return self.crew.by_rows(function, hidden.shape)

    def load_ends(self) -> None:
        """Read the last norm and the embedding, which the MTP block needs."""
        self._load_embedding(self.model.mtp_embedding_name)
        self.load_norm()

    def load_norm(self) -> None:
        """Read the norm after the last layer."""
        self._norm.load_state_dict({"weight": self._read(self.model.norm_name)}, assign=True)

    @torch.inference_mode()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the head multiplies, of hidden states (n, H) after the last layer."""
        normed: Tensor = self._norm(hidden)
        return normed

    @torch.inference_mode()
    def run_mtp(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The MTP block on the trunk's hidden states (B, T, H) and the tokens (B, T)."""
        block = self._layers[-1]
        following = next_tokens(tokens.to(self._device))
        arguments = self._arguments[hidden.shape[1]][self.model.mtp_templates()[0]]

        def run(rows: slice) -> Tensor:
            embedded = self._embedding(following[rows]).to(self._dtype)
            output: Tensor = block(self._norm(hidden[rows]), embedded, **arguments)
            return output

        return self.by_rows(run, hidden)

    @torch.inference_mode()
    def mtp_logits(self, hidden: Tensor) -> Tensor:
        """What the MTP block predicts, (B, T, V), from its hidden states; it cannot run again."""
        block: Any = self._layers[-1]
        if self._head is None:
            block.layer.to("meta")  # what is left to compute is a norm and the head
            if self.model.mtp_head_name == self.model.mtp_embedding_name:
                self._head = self._embedding.weight
            else:
                self.drop_embedding()
                self._head = self._read(self.model.mtp_head_name)
        return torch.nn.functional.linear(block.norm(hidden), self._head)

    def mtp_best(self, hidden: Tensor) -> Tensor:
        """The likeliest token of each position, (B, T), a slice of positions at a time.

        A vocabulary is wide: the logits of a whole batch would take more than the layers do.
        """
        slices = torch.split(hidden.flatten(0, 1), _HEAD_TOKENS)
        self.mtp_logits(slices[0][:1, None])  # reads the head
        each = map if self.crew is None else self.crew.in_order
        best = list(each(lambda part: self.mtp_logits(part[None])[0].argmax(-1), slices))
        return torch.cat(best).view(hidden.shape[:2])

    def targets(self, index: int) -> dict[str, Target]:
        """What layer `index` is read from.

        A CPU keeps experts as they are stored and widens them one at a time.
        """
        if index not in self._found_targets:
            self._found_targets[index] = self._find_targets(index)
        return self._found_targets[index]

    def _find_targets(self, index: int) -> dict[str, Target]:
        widen = self._device.type != "cpu"
        dtypes = {name: value.dtype for name, value in self._layers[index].state_dict().items()}
        names = self._names[index]
        return layer_targets(self.weights, self.model, index, self._dtype, widen, dtypes, names)

    def _read(self, name: str, shared: bool = False) -> Tensor:
        self.loader.ask(name, {name: whole(self.weights, name, self._dtype)}, shared)
        return self.loader.take(name)[name]

    def why_not_finite(self, index: int) -> str:
        """Why what layer `index` computes is not finite: a weight by name, or an overflow."""
        names = [n for n in self.weights.tensors if self.model.role(n).layer == index]
        if index == self.model.facts.mtp_layer:  # it reads what the model's head reads
            names.append(self.model.norm_name)
        if index in (0, self.model.facts.mtp_layer):
            names.append(self.model.embedding_name)
        if bad := first_not_finite(self.weights, names):
            return (
                f"tensor {bad} of {self.weights.shown} holds NaN or infinite values; download "
                "it again, or repair the checkpoint"
            )
        advice = "" if self._dtype is torch.float32 else "; use --dtype float32"
        return f"all weights of the layer are finite, so values overflow in {self._dtype}{advice}"

    def close(self) -> None:
        """Stop reading and free what was read."""
        self.loader.close()
        if self._closes_threads:
            self._threads.close()


def _call_layer(layer: torch.nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    output = layer(hidden, **unshared(arguments))
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"{type(layer).__name__} returns {type(output).__name__}; this version of "
            "transformers is not supported"
        )
    return output


def _build(weights: Weights, dtype: torch.dtype) -> Any:
    """transformers' model on the meta device, without its head."""
    register()
    try:
        model = text_model(weights.config, dtype)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{weights.shown}: transformers cannot build the model of its config ({reason})"
        ) from error
    model.set_experts_implementation(IMPLEMENTATION)
    return model


def _build_rotary(base: Any, device: torch.device) -> None:
    """Give a model its rotary embedding: buffers that are computed, not stored.

    Some models have one for each type of layers, in one module.
    """
    for name, module in list(base.named_children()):
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
            setattr(base, name, type(module)(config=base.config).to(device))
