"""Results of builds as text; plan_views.py has plans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from reap2gguf.bundle.wording import wording
from reap2gguf.messages import shell_word, size
from reap2gguf.terminal.evaluate_views import quality_lines

if TYPE_CHECKING:
    from reap2gguf.building.stage import BuildResult, StageCost


def stages_beside(stage: StageCost, stages: Iterable[StageCost]) -> str:
    """The stage before this one that was not done when this one began; "" for none."""
    names = []
    for other in stages:
        if other is stage:
            break
        if not (stage.reused or other.reused) and stage.began < other.began + other.seconds:
            names.append(other.name)
    return names[-1] if names else ""


def result_lines(result: BuildResult) -> Iterable[str]:
    """What a build wrote, and how to use it."""
    manifest = result.manifest
    yield ""
    for stage in result.stages:
        again = "  (reused)" if stage.reused else ""
        if beside := stages_beside(stage, result.stages):
            again = f"  (beside {beside})"
        peak = size(stage.peak_bytes)
        yield f"  {stage.name:<8} {stage.seconds:>8.1f} s   peak memory so far {peak}{again}"
    mtp, words = manifest.pruning.mtp, wording(manifest.pruning)
    if mtp.n_tokens and mtp.state == "pruned":
        yield (
            f"  MTP head top-1 accuracy: {mtp.hits_before / mtp.n_tokens:.1%} before {words.act}, "
            f"{mtp.hits_after / mtp.n_tokens:.1%} after"
        )
    yield ""
    if any(stage.name == "verify" and not stage.reused for stage in result.stages):
        for check in manifest.verification["passed"]:
            yield f"  verified  {check}"
        yield ""
    if (budget := manifest.budget) is not None:
        counts, best = ", ".join(str(one.n_experts) for one in budget.counts), budget.best
        yield f"  experts   {best.n_experts}, which loses least for {budget.target}, of {counts}"
    if (choice := manifest.choice) is not None:
        yield f"  method    {choice.chosen}, the best of {len(choice.candidates)} measured"
        yield ""
    if manifest.evaluation is not None and manifest.evaluation.variants:
        for line in quality_lines(manifest.evaluation, words):
            yield f"  quality   {line}"
        yield ""
    if manifest.hf is not None:
        yield f"  {result.hf_folder}/  {size(manifest.hf.n_bytes)}"
    for record in manifest.gguf:
        yield f"  {result.gguf_folder / record.file}  {size(record.n_bytes)}"
    for side in manifest.side_files:
        yield f"  {result.gguf_folder / side.file}  {size(side.n_bytes)}"
    yield ""
    yield f"Try it:  reap2gguf chat {shell_word(result.gguf_folder)}"
