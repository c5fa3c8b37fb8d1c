"""How a sweep fits into memory: tokens per batch, where hidden states wait, whether to prefetch.

The memory of a batch is estimated from the model's dimensions. If the estimate is too low, the
sweep halves a batch that does not fit. Weights are exact; hidden states count without padding.
Nothing here loads torch: `plan` estimates memory with the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.models.description import Expert
from reap2gguf.observing.linear_attention import attention_widths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.contract import MoeModel

# Larger batches are no faster: the tokens of each expert are enough to keep the machine busy.
MOST_TOKENS = {"cpu": 8192, "cuda": 32768}
# Of a CPU: the code that torch's libraries load for the first batch, and per thread their buffers,
# its stack and the small blocks that its heap keeps (measured with 2 to 16 threads).
LIBRARY_BYTES = 24 * 2**20
THREAD_BYTES = 8 * 2**20
# Layers that a batch goes through at once, at most. More make the disk's share hardly smaller, and
# the progress is saved between two groups of layers.
MOST_LAYERS = 8
# With fewer, a GPU waits for the disk: then a batch may be half as large for one layer more.
_FEW_LAYERS = 4
CONTEXT_BYTES = 640 * 2**20  # what CUDA and its libraries take of a GPU, tensors aside
HOST_BYTES = 2 * 2**30  # of the host, left to the rest of the program and to the system
_SLACK = 0.92  # allocators round up
# Of the weights of attention over a whole row, of all heads, where no kernel computes it in pieces:
# 3.2 were measured.
_EAGER_COPIES = 4
_MOVING = 4  # batches of hidden states on their way to and from the host
_USUAL = 0.85  # of what a batch takes at most (bench/plan.py)
_SMALLEST_RAISE = 2**26  # what a message advises to add to --memory, at least

# The progress of a sweep is saved between two layers where that takes little of its time.
MOST_OF_TIME = 0.05  # share of the time that saving may take
_SAVE_SECONDS = 0.05  # at least
_SAVED_BYTES_PER_SECOND = 5e8


@dataclass(frozen=True)
class Need:
    """What a sweep needs, in bytes."""

    layer: int  # weights of the largest layer
    position: int  # one position of a batch, while it is computed
    hidden: int  # hidden state of one position
    n_positions: int
    longest_row: int  # positions
    n_layers: int = 1
    embedding: int = 0  # the token embedding, and the head
    has_mtp: bool = False  # an MTP block runs last, beside the embedding
    others: int = 0  # threads of a CPU, and the sums that the observer holds


@dataclass(frozen=True)
class Memory:
    """Bytes that a sweep may take; of several processes, the least that any of them has."""

    free: int  # on the computing device
    host: int  # free in RAM
    limit: int | None = None  # what --memory allows the process to take of the device
    allowed: int | None = None  # what the limit leaves to the sweep
    n_sharing: int = 1  # processes that share the limit

    @property
    def usable(self) -> int:
        """Bytes of the device that the sweep may take."""
        return self.free if self.allowed is None else min(self.free, self.allowed)


@dataclass(frozen=True)
class Budget:
    """How the memory is divided."""

    batch_tokens: int
    spool: str  # device, host or disk
    prefetch: bool  # read a layer's weights while another layer computes
    depth: int = 1  # layers that a batch goes through before its hidden states wait again


def layer_bytes(
    model: MoeModel, tensors: Mapping[str, StoredTensor], itemsize: int, on_gpu: bool
) -> dict[int, int]:
    """Memory of each layer's weights, by headers alone, whatever type they are stored in.

    A CPU keeps experts as they are stored and widens them one at a time.
    """
    found: dict[int, int] = {}
    for name, tensor in tensors.items():
        role = model.role(name)
        if role.layer is None:
            continue
        is_as_stored = isinstance(role, Expert) and not on_gpu
        n_bytes = tensor.n_bytes if is_as_stored else tensor.n_elements * itemsize
        found[role.layer] = found.get(role.layer, 0) + n_bytes
    return found


def copies_experts(
    model: MoeModel, tensors: Mapping[str, StoredTensor], itemsize: int, on_gpu: bool
) -> bool:
    """Whether a thread of a CPU converts the experts that it computes with."""
    computing = {2: "BF16", 4: "F32"}[itemsize]
    return not on_gpu and any(
        tensor.dtype != computing and isinstance(model.role(name), Expert)
        for name, tensor in tensors.items()
    )


def importance_bytes(model: MoeModel) -> int:
    """Memory of an importance matrix while it is computed: the sums of its expert matrices.

    Finished layers are float32. The current one has float64 sums, their copy at its end, and a
    batch's float32 sums before and after they are settled. Other matrices have one row of sums.
    """
    facts = model.facts
    n_values = facts.n_experts * (facts.expert_io_width + facts.expert_width)
    return n_values * (4 * len(facts.moe_layers) + 2 * 8 + 2 * 4)


@dataclass(frozen=True)
class Kind:
    """What kind of sweep runs: of which model, in values of how many bytes, and where."""

    model: MoeModel
    itemsize: int
    on_gpu: bool
    has_linear_attention: bool
    n_threads: int = 1  # of a CPU
    sums: int = 0  # bytes that the observer holds, on a CPU
    copies_experts: bool = False  # a CPU's thread holds one expert in the computing type

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden state of one position."""
        return self.model.facts.hidden_size * self.itemsize

    def need(
        self, layers: Mapping[int, int], embedding: int, n_positions: int, longest_row: int
    ) -> Need:
        """What a sweep over some layers needs, given the bytes of their weights."""
        widths = attention_widths(self.has_linear_attention, self.on_gpu)
        return Need(
            layer=max(layers.values()),
            position=position_bytes(self.model, widths, self.itemsize, self.on_gpu, longest_row),
            hidden=self.hidden_bytes,
            n_positions=n_positions,
            longest_row=longest_row,
            n_layers=len(layers),
            embedding=embedding,
            has_mtp=self.model.facts.mtp_layer in layers,
            others=self._others(),
        )

    def _others(self) -> int:
        """Bytes on a CPU that neither the batch nor the layers change."""
        if self.on_gpu:
            return 0
        facts = self.model.facts
        expert = 3 * facts.expert_io_width * facts.expert_width * self.itemsize
        thread = THREAD_BYTES + expert * self.copies_experts
        return LIBRARY_BYTES + self.n_threads * thread + self.sums


def cpu_memory(host: int, limit: int | None, resident: int, n_sharing: int = 1) -> Memory:
    """What a sweep on a CPU may take: `host` bytes of RAM are free for each of the processes.

    `limit`: --memory, which the processes share; `resident`: bytes that the process has already.
    """
    free = host - HOST_BYTES // 4
    if limit is None:
        return Memory(free, host)
    return Memory(free, host, limit, limit // n_sharing - resident, n_sharing)


def gpu_memory(free: int, total: int, host: int, limit: int | None) -> Memory:
    """What a sweep on a GPU may take: of `total` bytes `free` are free; each process has its own.

    CUDA's own memory counts in `limit`, and is not free any more when a sweep asks.
    """
    if limit is None:
        return Memory(free, host)
    return Memory(free, host, limit, min(limit, total) - CONTEXT_BYTES)


def save_seconds(n_bytes: int) -> float:
    """About how long it takes to save the progress of a sweep, hidden states of `n_bytes`."""
    return _SAVE_SECONDS + n_bytes / _SAVED_BYTES_PER_SECOND


def position_bytes(
    model: MoeModel, widths: int, itemsize: int, on_gpu: bool, longest_row: int
) -> int:
    """Bytes that a position of a batch takes at most in a layer, weights aside.

    `widths`: what its attention takes (`attention_widths`); `itemsize`: bytes of a value.
    """
    facts = model.facts
    attention = widths * facts.hidden_size * itemsize
    if model.has_eager_attention:
        attention += _EAGER_COPIES * facts.n_heads * longest_row * itemsize
    attention = max(attention, model.mixer_bytes())
    if not on_gpu:
        return attention  # a thread computes one expert at a time, which has few pairs
    pair = 2 * facts.expert_io_width + 4 * facts.expert_width
    experts = facts.experts_per_token * pair * itemsize
    return max(attention, experts) + 8 * facts.hidden_size * itemsize


def fit(need: Need, device_type: str, memory: Memory, spool: str) -> Budget:
    """Divide the memory of the device among weights and batches.

    Takes the first way that leaves room for batches of full speed, else the first that works.
    `spool`: auto, device, host or disk. Raises UsageError if not even one row fits.
    """
    most = MOST_TOKENS[device_type]
    ways = _ways(need, device_type, spool, memory.host)
    for share, must_prefetch in ((2, True), (4, True), (most, False)):
        least = max(min(most // share, need.n_positions), need.longest_row)
        for kind, prefetch in ways:
            tokens = _tokens(need, memory.usable, kind, prefetch)
            if tokens >= least and prefetch >= must_prefetch:
                depth = _depth(need, device_type, memory.usable, kind, prefetch, least)
                tokens = _tokens(need, memory.usable, kind, prefetch, depth)
                # a batch holds at least one row
                size = max(_rounded(min(most, tokens)), need.longest_row)
                return Budget(size, kind, prefetch, depth)
    raise _too_little(need, memory, min(_least_bytes(need, *way) for way in ways))


def _depth(
    need: Need, device_type: str, usable: int, spool: str, prefetch: bool, least: int
) -> int:
    """Layers that a batch of `least` positions can go through between two visits to the spool.

    A GPU computes faster than a disk writes; a CPU does not, and other spools are fast enough. If
    they are few, a batch of fewer positions goes through up to `_FEW_LAYERS`.
    """
    if device_type == "cpu" or spool != "disk" or not prefetch:
        return 1
    depths = range(min(MOST_LAYERS, need.n_layers - 1), 1, -1)

    def deepest(positions: int) -> int:
        fits = (d for d in depths if _tokens(need, usable, spool, prefetch, d) >= positions)
        return next(fits, 1)

    fewer = max(min(MOST_TOKENS[device_type] // 4, least), need.longest_row)
    return max(deepest(least), min(deepest(fewer), _FEW_LAYERS))


def fits_beside(
    n_bytes: int, budget: Budget, need: Need, device_type: str, memory: Memory, spool: str
) -> bool:
    """Whether other work may take `n_bytes` of RAM while a sweep runs that has a budget.

    It may if the sweep's budget would be the same without them: so the work beside a sweep changes
    neither its batches nor its sums, and both together keep the limit.
    """
    host = memory.host - n_bytes
    left = replace(memory, host=host)
    if device_type == "cpu":
        allowed = None if memory.allowed is None else memory.allowed - n_bytes
        left = replace(left, free=memory.free - n_bytes, allowed=allowed)
    on_host = need.n_positions * need.hidden if budget.spool == "host" else 0
    if device_type == "cuda" and host < on_host + HOST_BYTES:
        return False
    try:
        return fit(need, device_type, left, spool) == budget
    except UsageError:
        return False


def held_bytes(need: Need, budget: Budget) -> int:
    """Memory of the device that a sweep usually takes, divided like this."""
    batch = min(budget.batch_tokens, max(need.n_positions, need.longest_row))
    held = int(batch * _position(need, budget.spool) * _USUAL)
    return _fixed(need, budget.spool, budget.prefetch, budget.depth) + held


def _ways(need: Need, device_type: str, spool: str, host: int) -> list[tuple[str, bool]]:
    """Where hidden states may wait and whether to prefetch, best first."""
    if spool != "auto":
        kind = "device" if spool == "host" and device_type == "cpu" else spool
        return [(kind, True), (kind, False)]
    if device_type == "cpu":
        return [("device", True), ("device", False), ("disk", True), ("disk", False)]
    fits_host = need.n_positions * need.hidden <= host - HOST_BYTES
    kind = "host" if fits_host else "disk"
    return [("device", True), (kind, True), (kind, False)]


def _tokens(need: Need, usable: int, spool: str, prefetch: bool, depth: int = 1) -> int:
    """Positions of a batch that fit into `usable` bytes."""
    left = usable * _SLACK - _fixed(need, spool, prefetch, depth)
    return max(0, int(left // _position(need, spool)))


def _least_bytes(need: Need, spool: str, prefetch: bool) -> float:
    """Bytes that a sweep takes with batches of one row."""
    return (_fixed(need, spool, prefetch) + need.longest_row * _position(need, spool)) / _SLACK


def _fixed(need: Need, spool: str, prefetch: bool, depth: int = 1) -> int:
    """Bytes that do not depend on the batch: weights, and hidden states on the device."""
    # the embedding is in memory while the first layer is read, and beside an MTP block's layer
    beside = need.layer if prefetch or need.has_mtp else 0
    weights = max(need.layer * (depth + prefetch), need.embedding + beside)
    waiting = need.n_positions * need.hidden if spool == "device" else 0
    return weights + waiting + need.others


def _position(need: Need, spool: str) -> int:
    return need.position + (0 if spool == "device" else _MOVING * need.hidden)


def _rounded(tokens: int) -> int:
    """A power of two, so that a little more or less free memory changes neither batches nor sums.

    It does not depend on the number of threads.
    """
    return 1 << (tokens.bit_length() - 1) if tokens else 0


def _too_little(need: Need, memory: Memory, least: float) -> UsageError:
    """The error for a sweep that takes at least `least` bytes."""
    what = f"a layer of {size_text(need.layer)} and a row of {need.longest_row:,} tokens"
    if memory.limit is not None and memory.allowed is not None and least <= memory.free:
        more = memory.n_sharing * max(least - memory.allowed, _SMALLEST_RAISE)
        return UsageError(
            f"--memory {size_text(memory.limit)} is too small; this model needs at least "
            f"{_rounded_up(memory.limit + more)} for {what}; raise it, or use a smaller "
            "--max-length (--chunk of texts that are scored)"
        )
    return UsageError(
        f"not enough memory: {size_text(max(0, memory.free))} free, and a calibration pass "
        f"needs at least {_rounded_up(least)} for {what}; use a smaller --max-length"
    )


def size_text(n_bytes: float) -> str:
    """A size for a message: bytes, MiB or GiB."""
    if n_bytes < 2**20:
        return f"{n_bytes:,.0f} bytes"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def _rounded_up(n_bytes: float) -> str:
    """A size in GiB, not less than `n_bytes`."""
    return f"{math.ceil(n_bytes / 2**30 * 10) / 10:.1f} GiB"
