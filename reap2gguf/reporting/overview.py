"""The head of the page: what was done, in one sentence, in a ledger of stages, and in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.bundle.front_matter import methods_of
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.messages import parameters, size
from reap2gguf.pruning.methods import done_by, method_name
from reap2gguf.reporting.html import Child, Html, code, element, hub_link, section, together
from reap2gguf.reporting.numbers import with_error
from reap2gguf.reporting.tables import NOT_MEASURED
from reap2gguf.reporting.tables import facts as facts_list

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.reporting.facts import Damage, ReportFacts


def damage_title(facts: ReportFacts, damage: Damage) -> str:
    """What a step is called: what was done to the experts, quantizing, or both."""
    if damage == "pruning":
        return facts.words.act
    return {"quantizing": "quantizing", "both": "both together"}[damage]


def head(facts: ReportFacts) -> Html:
    """The title and the sentence under it."""
    return element(
        "header",
        element("p", "Report of a bundle", class_="over"),
        element("h1", facts.manifest.name),
        element("p", _sentence(facts), class_="lede"),
    )


def _sentence(facts: ReportFacts) -> Child:
    manifest = facts.manifest
    pruning, n_files = manifest.pruning, len(manifest.gguf)
    files = "one GGUF file" if n_files == 1 else f"{n_files} GGUF files"
    source = source_link(manifest)
    if not facts.is_pruned:
        return [source, f" with all of its {pruning.n_experts} experts per layer, in {files}."]
    share = 1 - pruning.n_kept / pruning.n_experts
    kept = f"{pruning.n_kept} of {pruning.n_experts}"
    here = f"Here in {files}." if manifest.hf is None else f"Here in safetensors and in {files}."
    rest = f"{method(manifest)} kept {kept} in every layer"
    if pruning.merge is not None:
        merged = f"{kept} remain in every layer, some of them averages"
        what = f" with {100 * share:.3g} % of its experts merged into the others by"
        return [source, f"{what} {method(manifest)}: {merged}. {here}"]
    if pruning.repair is not None:
        rest += ", and their weights were repaired"
    return [source, f" without {100 * share:.3g} % of its experts: {rest}. {here}"]


def method(manifest: Manifest) -> str:
    """The method that chose or merged the experts, as it is called."""
    return method_name(manifest.pruning.method)


def source_link(manifest: Manifest) -> Html:
    """The source, with a link where it is on the Hub."""
    return hub_link(manifest.source.label)


def summary(facts: ReportFacts) -> Html:
    """What was done in numbers."""
    return section("summary", "What was done", _ledger(facts), facts_list(list(_numbers(facts))))


@dataclass(frozen=True)
class _Stage:
    title: str
    name: Child
    rows: tuple[tuple[str, Child], ...]


def _ledger(facts: ReportFacts) -> Html:
    """Source, pruned model and first file side by side; between them what each step cost."""
    parts: list[Html] = [_stage(_source(facts))]
    first = facts.variant_of(facts.manifest.gguf[0])
    if facts.is_pruned and facts.manifest.hf is None:  # made of a GGUF file
        step: Damage = "pruning" if facts.is_cut else "both"
        parts += [_step(facts, step, "source", first), _stage(_file(facts))]
        return element("div", parts, class_="ledger")
    if facts.is_pruned:
        parts += [_step(facts, "pruning", "source", "pruned"), _stage(_pruned(facts))]
    before = "pruned" if facts.is_pruned else "source"
    parts += [_step(facts, "quantizing", before, first), _stage(_file(facts))]
    return element("div", parts, class_="ledger")


def _stage(stage: _Stage) -> Html:
    rows = [element("div", element("dt", n), element("dd", shown)) for n, shown in stage.rows]
    return element(
        "div",
        element("h3", stage.title),
        element("p", stage.name, class_="stage-name"),
        element("dl", rows),
        class_="stage",
    )


def _step(facts: ReportFacts, damage: Damage, reference: str, variant: str | None) -> Html:
    found = None
    if facts.evaluation is not None and variant is not None:
        found = facts.evaluation.divergence(variant, reference)
    cost: Child = element("span", f"cost {NOT_MEASURED}", class_="none")
    if found is not None:
        cost = [
            element("span", "KL divergence", class_="what"),
            element("strong", with_error(found.mean)),
            element("span", "same top token", class_="what"),
            element("strong", with_error(found.same_top, 100, " %")),
        ]
    name = element("span", damage_title(facts, damage), class_="step-name")
    return element("div", name, cost, class_=f"step {damage}")


def _perplexity(facts: ReportFacts, variant: str | None) -> Child:
    found = None
    if facts.evaluation is not None and variant is not None:
        found = facts.evaluation.variant(variant)
    if found is None:
        return element("span", NOT_MEASURED, class_="none")
    return with_error(found.perplexity)


def _source(facts: ReportFacts) -> _Stage:
    source, pruning = facts.manifest.source, facts.manifest.pruning
    return _Stage(
        "Source",
        source_link(facts.manifest),
        (
            ("parameters", parameters(source.n_parameters)),
            ("experts per layer", f"{pruning.n_experts}"),
            ("size", size(source.n_bytes)),
            ("perplexity", _perplexity(facts, "source")),
        ),
    )


def _pruned(facts: ReportFacts) -> _Stage:
    manifest = facts.manifest
    return _Stage(
        facts.words.model.capitalize(),
        "safetensors",
        (
            ("parameters", parameters(manifest.n_parameters)),
            ("experts per layer", f"{manifest.pruning.n_kept}"),
            ("size", NOT_MEASURED if manifest.hf is None else size(manifest.hf.n_bytes)),
            ("perplexity", _perplexity(facts, "pruned")),
        ),
    )


def _file(facts: ReportFacts) -> _Stage:
    record = facts.manifest.gguf[0]
    return _Stage(
        "Quantized",
        [code(record.label), ", the first file" if len(facts.manifest.gguf) > 1 else None],
        (
            ("bits per weight", f"{record.bits_per_weight:.2f}"),
            ("experts per layer", f"{facts.manifest.pruning.n_kept}"),
            ("size", size(record.n_bytes)),
            ("perplexity", _perplexity(facts, facts.variant_of(record))),
        ),
    )


def _numbers(facts: ReportFacts) -> Iterator[tuple[str, Child]]:
    manifest = facts.manifest
    pruning, source = manifest.pruning, manifest.source
    revision = f" at {source.revision[:12]}" if source.revision else ""
    yield "source", together(source_link(manifest), revision)
    yield "architecture", source.architecture
    yield "experts per layer", f"{pruning.n_kept} of {pruning.n_experts}"
    yield "active experts per token", str(pruning.experts_per_token)
    yield "parameters", f"{manifest.n_parameters:,} of {source.n_parameters:,}"
    how = "pruned by" if pruning.merge is None else "merged by"
    yield how, "nothing was pruned" if pruning.method == NO_METHOD else method(manifest)
    if pruning.repair is not None:
        yield "repair", f"{pruning.repair.kind}, fitted on {pruning.repair.n_fitted:,} tokens"
    if pruning.mtp.state != "none":
        yield "multi-token prediction (MTP)", _mtp(facts)
    if source.earlier is not None:
        earlier = source.earlier
        before = f"{earlier.label} had {earlier.n_experts} experts per layer"
        text = f"the source is itself a {done_by(earlier.methods)} model: {before}"
        all_own = done_by(methods_of(pruning.method, earlier)) == "pruned"
        left = "of which" if all_own else "in place of which"
        yield f"{done_by(earlier.methods)} before", f"{text}, {left} {pruning.n_kept} remain"
    yield "checks", str(manifest.verification.get("summary", "not run"))


def _mtp(facts: ReportFacts) -> str:
    mtp = facts.manifest.pruning.mtp
    if not mtp.n_tokens:
        return mtp.state
    before, after = mtp.hits_before / mtp.n_tokens, mtp.hits_after / mtp.n_tokens
    if mtp.state == "kept":
        return f"kept; top-1 accuracy {after:.1%}"
    return f"{mtp.state}; top-1 accuracy {before:.1%} before {facts.words.act}, {after:.1%} after"
