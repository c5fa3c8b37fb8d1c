"""What a build will need: disk space exactly, memory and time roughly."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.atomic import output_errors
from reap2gguf.calibration.spec import DEFAULT_MIX, Component
from reap2gguf.errors import OutputError
from reap2gguf.gguf_files.reader import row_bytes
from reap2gguf.models.description import Carried, Dropped, Expert, SideFile
from reap2gguf.observing.budget import CONTEXT_BYTES, MOST_TOKENS
from reap2gguf.observing.linear_attention import ATTENTION_WIDTHS
from reap2gguf.pruning.write import companion_files
from reap2gguf.resources import shipped_folder
from reap2gguf.verifying.exactness import EXACT_TYPES, SMALL_FILE

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.progress import Progress

# Rates behind the time estimate; bench/ measures them.
_CPU_FLOPS = 60e9  # per core, float32
_GPU_FLOPS = 150e12
_QUANTIZED_WEIGHTS = 11e6  # per core and second, Q4_K
_DISK_BYTES = 1e9
_CORES_BESIDE_A_GPU = 16  # fixed: what is verified, and recorded, may not depend on the machine
_MOST_EXACT = 0.1  # of a build, for quantizing large files again
_CARD_BYTES = 2**20  # cards, manifests and marks
_UNKNOWN = 2**62
_BASE_BYTES = 600 * 2**20  # Python, torch, transformers


@dataclass(frozen=True)
class Estimate:
    """What a build will need. Sizes are exact; time and memory are estimates."""

    disk_bytes: int
    state_bytes: int  # more disk space, to save the progress of a sweep between two layers
    memory_bytes: int
    memory: str  # which: "memory", or "GPU memory" where there is one
    seconds: float


def estimate(plan: Plan, has_gpu: bool) -> Estimate:
    """Disk space, memory and time of a build that starts from scratch."""
    options = plan.options
    threads = options.compute.threads
    n_tokens = _tokens_at_most(plan)
    quantized = sum(
        math.prod(entry.tensor.shape) for recipe in plan.recipes for entry in recipe.table
    )
    n_sweeps = 2 if plan.target.prunes else 1
    flops = n_sweeps * 2 * n_tokens * active_parameters(plan)
    seconds = (
        flops / (_GPU_FLOPS if has_gpu else _CPU_FLOPS * threads)
        + quantized / (_QUANTIZED_WEIGHTS * threads)
        + 5 * plan.checkpoint.n_bytes / _DISK_BYTES
    )
    gguf = sum(recipe.n_bytes for recipe in plan.recipes)
    gguf += sum(side_bytes(side) for side in plan.side_files)
    disk = plan.hf_bytes + gguf + _small_bytes(plan, n_tokens)
    # a new state is written beside the previous one
    state = 2 * n_tokens * plan.model.facts.hidden_size * (2 if has_gpu else 4)
    where = "GPU memory" if has_gpu else "memory"
    return Estimate(disk, state, _memory(plan, n_tokens, has_gpu), where, seconds)


def exact_recipes(plan: Plan, has_gpu: bool) -> frozenset[str]:
    """Names of the recipes whose files are verified by quantizing every tensor again.

    It finds every changed bit and takes as long as the export did. So it is done for every small
    file, and for large ones if it is cheap beside the calibration passes. The answer depends on
    the plan and the kind of device, not on a clock or the number of threads: the same inputs make
    the same manifest.
    """
    large = [recipe for recipe in plan.recipes if recipe.n_bytes >= SMALL_FILE]
    small = {recipe.name for recipe in plan.recipes} - {recipe.name for recipe in large}
    quantized = sum(
        math.prod(entry.tensor.shape)
        for recipe in large
        for entry in recipe.table
        if entry.tensor_type not in EXACT_TYPES
    )
    flops = 2 * 2 * _tokens_at_most(plan) * active_parameters(plan)
    cores = _CORES_BESIDE_A_GPU if has_gpu else 1
    sweeps = flops / (_GPU_FLOPS if has_gpu else _CPU_FLOPS)
    again = quantized / (_QUANTIZED_WEIGHTS * cores)
    if again > _MOST_EXACT * (sweeps + again):
        return frozenset(small)
    return frozenset(recipe.name for recipe in plan.recipes)


def _small_bytes(plan: Plan, n_tokens: int) -> int:
    """Upper bound of all files but tensors: tokenizer, headers, imatrix, text, cards."""
    facts = plan.model.facts
    companions = sum(f.stat().st_size for f in companion_files(plan.source.folder))
    columns = 2 * facts.hidden_size + facts.expert_width
    imatrix = 2 * 4 * len(facts.moe_layers) * (plan.target.n_kept + 16) * columns
    texts = n_tokens * (2 * 8 + 2 * 8)  # as numbers for two sweeps, and as text
    companions += plan.source.later_bytes
    return companions * (1 + len(plan.recipes)) + imatrix + texts + _CARD_BYTES


def _memory(plan: Plan, n_tokens: int, has_gpu: bool) -> int:
    """Bytes that a sweep takes of the GPU, or of RAM without one, if nothing limits it."""
    if plan.options.compute.memory is not None:
        return plan.options.compute.memory
    hidden = plan.model.facts.hidden_size * (2 if has_gpu else 4)
    batch = min(n_tokens, MOST_TOKENS["cuda" if has_gpu else "cpu"])
    # one layer computes while the next one is read
    weights = 2 * max(n for layer, n in _layer_bytes(plan).items() if layer is not None)
    base = CONTEXT_BYTES if has_gpu else _BASE_BYTES
    return base + weights + n_tokens * hidden + batch * ATTENTION_WIDTHS * hidden


def _tokens_at_most(plan: Plan) -> int:
    """Tokens of a sweep, at most: what was asked for, or what the texts can hold."""
    calibration, length = plan.calibration, plan.max_length
    rows = ((one, calibration.rows_of(one)) for one in calibration.components)
    found = sum(min(count * length, _tokens_in(one)) for one, count in rows)
    return min(calibration.samples * length, found)


def _tokens_in(component: Component) -> int:
    """Upper bound of the tokens in local files; nothing is known about files on the Hub."""
    if not component.is_local or component.path.suffix == ".parquet":
        return _UNKNOWN
    path = shipped_folder("calibration") if component.name == DEFAULT_MIX else component.path
    files = [path, *path.glob("*")] if path.is_dir() else [path]
    # text has at least two bytes per token; Parquet is compressed
    return sum(file.stat().st_size for file in files if file.is_file()) // 2 + 1


def active_parameters(plan: Plan) -> int:
    """Parameters that one token uses, without the embedding."""
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


def check_room(plan: Plan, work: Workdir, progress: Progress) -> bool:
    """Whether the disk also has space to save the progress of a sweep between layers.

    Raises OutputError with the numbers if it does not even have space for the build. What an
    interrupted build left counts as written.
    """
    needs = estimate(plan, has_gpu=False)
    if plan.options.check_space:
        work.check_room(needs.disk_bytes)
        _check_cache(plan, work, needs.disk_bytes)
    room = work.free_bytes() + work.written_bytes()
    keeps_states = room >= needs.disk_bytes + needs.state_bytes
    if not keeps_states:
        progress.note(
            f"not enough disk space to save progress between layers ({needs.state_bytes:,} more "
            "bytes needed); an interrupted calibration pass restarts from layer 0"
        )
    return keeps_states


def _check_cache(plan: Plan, work: Workdir, n_bytes: int) -> None:
    """OutputError if the Hub's cache has no space for the weights that are not fetched yet."""
    unfetched, cache = plan.checkpoint.unfetched_bytes, plan.source.folder
    if not unfetched:
        return
    with output_errors(cache):
        free = shutil.disk_usage(cache).free
        is_shared = cache.stat().st_dev == work.output.stat().st_dev
    wanted = unfetched + (n_bytes - work.written_bytes() if is_shared else 0)
    if wanted > free:
        besides = " and the build writes its files there too" if is_shared else ""
        raise OutputError(
            f"{cache}: {unfetched:,} bytes of weights are not downloaded yet{besides}; "
            f"{wanted:,} bytes are needed on that disk, and {free:,} are free; free space, set "
            "HF_HOME to a folder on another disk, or pass --no-space-check"
        )
