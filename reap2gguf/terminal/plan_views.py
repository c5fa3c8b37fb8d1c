"""A plan as text: short, with the summary last, so that 24 lines show what counts."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from reap2gguf.building.needs.disk import side_bytes
from reap2gguf.building.needs.rented import H100
from reap2gguf.calibration.spec import DEFAULT_MIX
from reap2gguf.exporting.quantizers import quantizers_of
from reap2gguf.gguf_files.imatrix_coverage import FEW
from reap2gguf.messages import duration, quantity, size
from reap2gguf.pruning.methods import done_by
from reap2gguf.terminal.imatrix_views import expert_lines
from reap2gguf.terminal.plan_advice import (
    choice_lines,
    copied_lines,
    coverage_lines,
    covered_experts,
    expert_count_lines,
    odd_row_lines,
    quality_line,
)
from reap2gguf.terminal.target_views import (
    kept_lines,
    remaining_line,
    sized_lines,
    waiting_lines,
)

if TYPE_CHECKING:
    from reap2gguf.building.needs.estimate import Estimate
    from reap2gguf.building.plan import Plan
    from reap2gguf.quantizing.resolve import ResolvedRecipe

_COLUMNS = 80
_TIED = "\u00a0"  # a space at which no line is broken
_SHOWN_STAGE = 0.05  # of the whole time, at least
_SHOWN_TYPES = 5
_WHERE = {"device": "in RAM", "host": "in RAM", "disk": "on disk", "": ""}


def plan_lines(plan: Plan, needs: Estimate, with_tensors: bool = False) -> Iterable[str]:
    """A plan for people: what it makes, then what it needs of this machine.

    `with_tensors`: the type of every kind of tensor, too.
    """
    quantizers = quantizers_of(plan.recipes, plan.weighted, plan.options.compute.device)
    return _lines(plan, needs, with_tensors, quantizers.line, with_coverage=True)


def _lines(
    plan: Plan,
    needs: Estimate,
    with_tensors: bool = False,
    quantizers: str = "",
    with_coverage: bool = False,
) -> Iterator[str]:
    yield f"{plan.source.label} -> {plan.name}"
    for caveat in plan.caveats:  # first, since 24 lines of a terminal show the last ones
        yield from _wrapped(f"note: {caveat}")
    for line in _model(plan):
        yield from _wrapped(line)
    yield from _wrapped(_calibration(plan, needs))
    if with_coverage:
        for line in coverage_lines(needs.reused.coverage):
            yield from _wrapped(line)
    yield from _wrapped(quality_line(plan, needs))
    for line in waiting_lines(needs):
        yield from _wrapped(line)
    for warning in plan.warnings:
        yield from _wrapped(f"warning: {warning}")
    yield from _files(plan, with_tensors)
    if with_tensors and (covered := covered_experts(plan, needs.reused.coverage)):
        yield "  tokens of the importance matrix per expert:"
        yield from (f"    {line}" for line in expert_lines(covered, FEW))
    if quantizers and not needs.reused.is_up_to_date:
        yield from _wrapped(quantizers)
    for line in _needs(needs):
        yield from _wrapped(line)


def up_to_date_or_lines(plan: Plan, needs: Estimate) -> Iterable[str]:
    """The same for a build that starts: nothing where the bundle is up to date.

    The build itself says what quantizes, when it has tried the kernels.
    """
    return () if needs.reused.is_up_to_date else _lines(plan, needs)


def _wrapped(text: str, indent: str = "  ") -> Iterator[str]:
    """A line of a plan, in as many lines as its width needs; `_TIED` words stay together."""
    lines = textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    yield from (line.replace(_TIED, " ") for line in lines)


def _model(plan: Plan) -> Iterator[str]:
    target = plan.target
    yield remaining_line(plan)
    if unfetched := plan.checkpoint.unfetched_bytes:
        cached = plan.checkpoint.n_stored_bytes - unfetched
        in_cache = f"; {size(cached)} are in the cache" if cached > 0 else ""
        yield f"{size(unfetched)} of weights will be fetched from the Hub{in_cache}"
    yield from kept_lines(plan)
    if plan.chooses:
        names = ", ".join(plan.candidates)
        yield f"method: the best of {names}, measured on held-out rows and on another text"
    if not target.prunes:
        yield "nothing is pruned: no pass to rank experts, and no copy of the safetensors"
    yield from choice_lines(plan)
    if plan.history is not None:
        of = "of the" if done_by(plan.history.methods) == "pruned" else "in place of the"
        yield (
            f"the source was {done_by(plan.history.methods)} before: it has {target.n_experts} "
            f"{of} {plan.history.n_experts} experts of {plan.history.label}"
        )
    yield from expert_count_lines(plan)
    if plan.mtp != "none":
        yield f"multi-token-prediction block: {plan.mtp}"


def _calibration(plan: Plan, needs: Estimate) -> str:
    """What ranks the experts and weights the quantization: given files, or text."""
    parts = []
    if plan.observations is not None:
        parts.append(f"observations: {plan.observations.file}, reused")
    if plan.quantizes_by_sums:
        parts.append("importance matrix: of MODEL, taken in the pass that ranks the experts")
    if plan.imatrix is not None:
        cut = "" if plan.imatrix.cut_from is None else " and cut to the experts that stay"
        parts.append(f"importance matrix: {plan.imatrix.file}, reused{cut}")
    if plan.reads_calibration:
        parts.append(_text(plan, needs))
    return f"calibration: {', '.join(parts)}"


def _text(plan: Plan, needs: Estimate) -> str:
    """The text of the calibration passes, with its true rows and tokens where they are known."""
    amount = needs.amount
    known = {"exactly": "", "about": "about ", "at most": "up to "}[amount.known]
    packed = ", samples packed" if plan.calibration.pack else ""
    line = (
        f"{plan.calibration.label}, {known}{amount.n_rows:,} rows, "
        f"{_rounded(amount.n_tokens)}{packed}"
    )
    if not plan.reads_rows:
        line = f"{plan.calibration.label}, {known}{_rounded(amount.n_chunk_tokens)}"
    if plan.calibration.label == DEFAULT_MIX:
        line += " (small: for a release use seed-000 or your own)"
    return line


def _rounded(n_tokens: int) -> str:
    """Tokens without decimals where there are thousands: 77 k tokens."""
    if 1000 <= n_tokens < 1e6:
        return f"{n_tokens / 1000:.0f} k tokens"
    return quantity(n_tokens, "tokens")


def _files(plan: Plan, with_tensors: bool) -> Iterator[str]:
    """Each file with its size, and the types of its tensors."""
    if plan.writes_hf:
        most = "up to " if plan.weighs else ""
        yield f"  {plan.name}/  {most}{size(plan.hf_bytes)} of safetensors"
    for recipe in plan.recipes:
        sizes = plan.file_sizes(recipe)
        parts = f" in {len(sizes)} parts" if len(sizes) > 1 else ""
        yield f"  {plan.gguf_name(recipe)}  {size(sum(sizes))}{parts}"
        if plan.sized is not None and recipe is plan.recipes[-1]:
            for line in sized_lines(plan.sized, recipe):
                yield from _wrapped(line, "    ")
            continue
        bits = f"{recipe.file_type}, {recipe.bits_per_weight:.2f} bits per weight: "
        yield from _wrapped(bits + _types(recipe), "    ")
        for line in (*odd_row_lines(recipe), *copied_lines(recipe)):
            yield from _wrapped(line, "    ")
        if with_tensors:
            yield from _type_lines(recipe)
    for side in plan.side_files:
        yield from _wrapped(f"{plan.side_name(side)}  {size(side_bytes(side))}, {side.title}")


def _types(recipe: ResolvedRecipe) -> str:
    """The types of a recipe, each with its number of tensors; norms and the like are left out."""
    counts = Counter(entry.tensor_type.name for entry in recipe.table)
    if len(counts) > 1:
        del counts["F32"]
    most = [f"{name}{_TIED}x{_TIED}{count}" for name, count in counts.most_common(_SHOWN_TYPES)]
    return ", ".join(most) + (", ..." if len(counts) > _SHOWN_TYPES else "")


def _type_lines(recipe: ResolvedRecipe) -> Iterable[str]:
    """The type table with layer numbers collapsed: one line per tensor name and type."""
    groups: Counter[tuple[str, str, str]] = Counter()
    for entry in recipe.table:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", entry.tensor.name)
        groups[name, entry.tensor_type.name, entry.rule or ""] += 1
    width = max(len(name) for name, _, _ in groups)
    names = list(dict.fromkeys(name for name, _, _ in groups))
    for (name, type_name, rule), count in sorted(
        groups.items(), key=lambda g: names.index(g[0][0])
    ):
        times = f"x{count}" if name.startswith("blk.") else ""
        because = f"rule {rule}" if rule else ""
        yield f"      {name:<{width}}  {type_name:<6} {times:<4} {because}".rstrip()


def _needs(needs: Estimate) -> Iterator[str]:
    """What this machine is, and what of it the build takes."""
    if needs.reused.is_up_to_date:
        yield "up to date: nothing is left to do"
        return
    machine = needs.machine
    yield f"runs on: {_device(needs)}; {_about(machine.memory_free_bytes)} of RAM free"
    yield f"memory: {_memory(needs)}"
    yield f"disk: {_disk(needs)}"
    if needs.reused.stages:
        yield f"reused: {', '.join(needs.reused.stages)}"
    yield f"time: {_time(needs)}"
    for problem in needs.problems:
        yield f"warning: {problem}"
    for advice in needs.advice:
        yield f"try: {advice}"


def _about(n_bytes: int) -> str:
    """A size without digits that an estimate does not have."""
    if n_bytes < 2**20:
        return size(n_bytes)
    if n_bytes < 2**30:
        return f"{n_bytes / 2**20:.0f} MiB"
    return f"{n_bytes / 2**30:.{0 if n_bytes >= 10 * 2**30 else 1}f} GiB"


def _device(needs: Estimate) -> str:
    machine = needs.machine
    cores = f"{machine.cores} {'core' if machine.cores == 1 else 'cores'}"
    if machine.gpu is None:
        asked = ", as --device says" if needs.plan.options.compute.device == "cpu" else ""
        return f"CPU ({cores}{asked or ', no GPU found'})"
    if not needs.has_device:
        return f"no GPU here: figures are for an {H100}"
    memory = f"{_about(machine.gpu.free_bytes)} of {_about(machine.gpu.n_bytes)} free"
    return f"{machine.gpu.name} ({memory}), {cores}"


def _memory(needs: Estimate) -> str:
    if needs.sweeps.problem:
        return "NOT ENOUGH"
    line = f"up to {_about(needs.memory_bytes)}"
    if needs.machine.gpu is not None:
        line = f"up to {_about(needs.gpu_memory_bytes)} of the GPU, {line} of RAM"
    if needs.mentions_hidden:
        where = _WHERE[needs.hidden_where]
        if needs.hidden_where == "device" and needs.machine.gpu is not None:
            where = "in GPU memory"
        line += f"; hidden states ({_about(needs.sweeps.hidden_bytes)}) wait {where}"
    return line


def _disk(needs: Estimate) -> str:
    beside = f" + {_about(needs.work_bytes)} while it runs" if needs.work_bytes >= 2**20 else ""
    line = f"{size(needs.disk_bytes)}{beside}"
    unfetched = needs.plan.checkpoint.unfetched_bytes
    if unfetched:
        line += f" + {size(unfetched)} in the Hub's cache"
    line += f", {_about(needs.machine.disk_free_bytes)} free"
    return line + (": NOT ENOUGH" if needs.lacks_disk else "")


def _time(needs: Estimate) -> str:
    """All together, the longest stages, and what an H100 would take where that is far less."""
    stages = sorted(needs.stages.items(), key=lambda item: -item[1])
    longest = [
        f"{name} {duration(seconds)}"
        for name, seconds in stages[:4]
        if seconds > _SHOWN_STAGE * needs.seconds
    ]
    line = f"about {duration(needs.seconds)} ({', '.join(longest)})"
    if needs.machine.gpu is None and needs.seconds > 3600:
        line += f"; on an {H100} about {duration(needs.rented(H100).seconds)}"
    return line
