"""What a build will take: room on the disk, exactly; memory and time, about."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reap2gguf.building.plan import Plan
from reap2gguf.calibration.spec import DEFAULT_MIX, Component
from reap2gguf.gguf_files.reader import row_bytes
from reap2gguf.models import Carried, Dropped, Expert, SideFile
from reap2gguf.observing.sizes import ATTENTION_WIDTHS, CONTEXT_BYTES, MOST_TOKENS
from reap2gguf.pruning.write import companion_files
from reap2gguf.resources import shipped_folder

# Rates behind the time estimate; bench/ measures them.
_CPU_FLOPS = 60e9  # a core, float32
_GPU_FLOPS = 150e12
_QUANTIZED_WEIGHTS = 11e6  # a core and second, Q4_K
_DISK_BYTES = 1e9
_CARD_BYTES = 2**20  # cards, manifests and marks
_UNKNOWN = 2**62
_BASE_BYTES = 600 * 2**20  # Python, torch, transformers


@dataclass(frozen=True)
class Estimate:
    """What a build will need; time and memory are estimates, sizes are exact."""

    disk_bytes: int
    state_bytes: int  # on the disk besides, to keep what a sweep has done between two layers
    memory_bytes: int
    memory: str  # which: "memory", or "GPU memory" where there is one
    seconds: float


def estimate(plan: Plan, has_gpu: bool) -> Estimate:
    """Disk, memory and time of a build that starts from nothing."""
    options = plan.options
    threads = options.compute.threads
    n_tokens = _tokens_at_most(plan)
    quantized = sum(
        math.prod(entry.tensor.shape) for recipe in plan.recipes for entry in recipe.table
    )
    flops = 2 * 2 * n_tokens * active_parameters(plan)  # two sweeps
    seconds = (
        flops / (_GPU_FLOPS if has_gpu else _CPU_FLOPS * threads)
        + quantized / (_QUANTIZED_WEIGHTS * threads)
        + 5 * plan.checkpoint.n_bytes / _DISK_BYTES
    )
    gguf = sum(recipe.n_bytes for recipe in plan.recipes)
    gguf += sum(side_bytes(side) for side in plan.side_files)
    disk = plan.hf_bytes + gguf + _small_bytes(plan, n_tokens)
    # a new state is written beside the one before
    state = 2 * n_tokens * plan.model.facts.hidden_size * (2 if has_gpu else 4)
    where = "GPU memory" if has_gpu else "memory"
    return Estimate(disk, state, _memory(plan, n_tokens, has_gpu), where, seconds)


def _small_bytes(plan: Plan, n_tokens: int) -> int:
    """What goes with the tensors, at most: tokenizer, headers, imatrix, text, cards."""
    facts = plan.model.facts
    companions = sum(f.stat().st_size for f in companion_files(plan.source.folder))
    columns = 2 * facts.hidden_size + facts.expert_width
    imatrix = 2 * 4 * len(facts.moe_layers) * (plan.target.n_kept + 16) * columns
    texts = n_tokens * (2 * 8 + 2 * 8)  # as numbers for two sweeps, and as text
    companions += plan.source.later_bytes
    return companions * (1 + len(plan.recipes)) + imatrix + texts + _CARD_BYTES


def _memory(plan: Plan, n_tokens: int, has_gpu: bool) -> int:
    """Bytes of the GPU, or of the host without one, that a sweep takes where nothing limits it."""
    if plan.options.compute.memory is not None:
        return plan.options.compute.memory
    hidden = plan.model.facts.hidden_size * (2 if has_gpu else 4)
    batch = min(n_tokens, MOST_TOKENS["cuda" if has_gpu else "cpu"])
    # one layer computes while another is read
    weights = 2 * max(n for layer, n in _layer_bytes(plan).items() if layer is not None)
    base = CONTEXT_BYTES if has_gpu else _BASE_BYTES
    return base + weights + n_tokens * hidden + batch * ATTENTION_WIDTHS * hidden


def _tokens_at_most(plan: Plan) -> int:
    """Tokens of a sweep: as many as were asked for, if the texts have that many."""
    calibration, length = plan.calibration, plan.max_length
    rows = ((one, calibration.rows_of(one)) for one in calibration.components)
    found = sum(min(count * length, _tokens_in(one)) for one, count in rows)
    return min(calibration.samples * length, found)


def _tokens_in(component: Component) -> int:
    """Tokens that files here may have; of what is on the Hub nothing is known."""
    if not component.is_local or component.path.suffix == ".parquet":
        return _UNKNOWN
    path = shipped_folder("calibration") if component.name == DEFAULT_MIX else component.path
    files = [path, *path.glob("*")] if path.is_dir() else [path]
    # two bytes a token is the worst that text comes to; Parquet is compressed
    return sum(file.stat().st_size for file in files if file.is_file()) // 2 + 1


def active_parameters(plan: Plan) -> int:
    """Parameters that one token meets, the embedding left out."""
    facts = plan.model.facts
    total = 0
    for name, tensor in plan.checkpoint.tensors.items():
        role = plan.model.role(name)
        if isinstance(role, Carried | Dropped):
            continue
        if isinstance(role, Expert):
            total += tensor.n_elements * facts.experts_per_token // facts.n_experts
        elif name != plan.model.embedding_name:
            total += tensor.n_elements
    return total


def side_bytes(side: SideFile) -> int:
    """Bytes of a side file's tensors."""
    tensor_types = side.tensor_types()
    return sum(
        math.prod(tensor.shape[:-1]) * row_bytes(tensor_types[tensor.name], tensor.n_columns)
        for tensor in side.tensors
    )


def _layer_bytes(plan: Plan) -> dict[int | None, int]:
    found: dict[int | None, int] = {}
    for name, tensor in plan.checkpoint.tensors.items():
        layer = plan.model.role(name).layer
        found[layer] = found.get(layer, 0) + tensor.n_bytes
    return found
