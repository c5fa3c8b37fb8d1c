"""How the bundle was made: calibration, command, versions, hashes, checks, and what to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from statistics import median
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import (
    CALIBRATION_FILE,
    IMATRIX_DAT_FILE,
    IMATRIX_FILE,
    MANIFEST_FILE,
    MODELFILE,
)
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.markdown import argument, repository
from reap2gguf.pruning.methods import (
    GIVEN,
    OBSERVED,
    is_from_weights,
    method_name,
    observes_nothing,
)
from reap2gguf.reporting.html import (
    Child,
    Html,
    absent,
    code,
    commands,
    details,
    element,
    hub_link,
    lines,
    paragraph,
    section,
    together,
)
from reap2gguf.reporting.tables import (
    Cell,
    Column,
    byte_size,
    count,
    missing,
    table,
    words,
)
from reap2gguf.reporting.tables import facts as facts_list

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import CalibrationRecord, ComponentRecord, ImportanceRecord
    from reap2gguf.bundle.records import PruningRecord
    from reap2gguf.reporting.facts import ReportFacts

_NOT_RECORDED = "not recorded"


def calibration(facts: ReportFacts) -> Html:
    """The section of the calibration texts."""
    return section(
        "calibration",
        "Calibration",
        facts_list(list(_calibration(facts))),
        _components(facts),
        _coverage(facts.manifest.calibration.imatrix_coverage),
    )


def _calibration(facts: ReportFacts) -> Iterator[tuple[str, Child]]:
    pruning, found = facts.manifest.pruning, facts.manifest.calibration
    if pruning.method == NO_METHOD:
        yield "ranking of the experts", "none: nothing was pruned"
    elif pruning.method == GIVEN:
        yield "ranking of the experts", "none: those that stay were named in a list"
    elif is_from_weights(pruning.method):
        yield "ranking of the experts", "by their weights alone: no text was read for it"
    else:
        if pruning.merge is not None:
            how = method_name(pruning.method)
            yield "merge of the experts", f"{how}, by what they do on these texts"
        yield "texts", found.spec or "not known"
        yield "rows", f"{pruning.n_rows:,}" + _dropped(pruning.n_dropped_rows)
        yield "tokens", f"{pruning.n_tokens:,}"
        if found.max_length is not None:
            yield "longest row", f"{found.max_length:,} tokens"
        if found.packed is not None:
            yield "samples", "packed, several per row" if found.packed else "one per row"
        if pruning.observations_file is not None:
            yield "observations", together("reused from ", code(pruning.observations_file))
    if found.seed is not None:
        yield "seed", str(found.seed)
    yield "importance matrix", _importance(found)
    if n_tokens := _importance_tokens(facts):
        yield "tokens of the importance matrix", f"{n_tokens:,}"
    if (covered := found.imatrix_coverage) is not None:
        yield "tokens per expert", _tokens_per_expert(covered)
    if found.imatrix_unseen:
        yield "experts without importance", f"{found.imatrix_unseen:,}: no token reached them"


def _dropped(count_: int) -> str:
    return f", of which {count_:,} had NaN or infinite values and were skipped" if count_ else ""


def _importance(found: CalibrationRecord) -> Child:
    if found.imatrix_chunks is None:
        return "none"
    total = found.imatrix_text_chunks
    of = f" of {total:,}" if total and total != found.imatrix_chunks else ""
    length = f" of {found.imatrix_chunk_size:,} tokens" if found.imatrix_chunk_size else ""
    name = found.imatrix_text or "a text without a name"
    text = f"{found.imatrix_chunks:,}{of} chunks{length}, of {name}"
    if found.is_of_observations:
        return f"{text}; taken on the source, in the pass that ranked the experts"
    if found.imatrix_file is not None:
        return together(text, "; it was not computed here but given as ", code(found.imatrix_file))
    return text


def _importance_tokens(facts: ReportFacts) -> int:
    """Tokens that the importance matrix was computed on; 0 if that is not recorded."""
    found = facts.manifest.calibration
    if found.is_of_observations and facts.manifest.pruning.n_tokens:
        return facts.manifest.pruning.n_tokens  # rows, of many lengths
    return (found.imatrix_chunks or 0) * (found.imatrix_chunk_size or 0)


def _tokens_per_expert(covered: ImportanceRecord) -> str:
    """What the importance matrix saw of the experts, in one line."""
    n_experts = sum(map(len, covered.tokens.values()))
    line = f"median {covered.median:,}, fewest {covered.fewest:,}"
    if covered.n_few:
        share = covered.n_few / max(1, n_experts)
        line += (
            f"; {covered.n_few:,} of {n_experts:,} experts ({share:.1%}) saw under "
            f"{covered.few_below:,}"
        )
    return line


def _coverage(covered: ImportanceRecord | None) -> Child:
    """Tokens of the importance matrix by layer, folded; nothing where they are not known."""
    if covered is None or not covered.tokens:
        return ""
    columns = [
        Column("layer"),
        Column("fewest tokens"),
        Column("median"),
        Column(f"experts under {covered.few_below:,}"),
        Column("experts without any"),
    ]
    rows = [
        [
            count(layer),
            count(min(tokens)),
            count(int(median(tokens))),
            count(sum(one < covered.few_below for one in tokens)),
            count(sum(one == 0 for one in tokens)),
        ]
        for layer, tokens in sorted(covered.tokens.items())
        if tokens
    ]
    title = "Tokens of the importance matrix that the experts of each layer saw"
    return details(title, table(title, columns, rows))


def _components(facts: ReportFacts) -> Html:
    found = facts.manifest.calibration.components
    if not found:
        return absent("What the calibration texts were made of is not listed.")
    columns = [
        Column("calibration data", is_number=False),
        Column("commit", is_number=False),
        Column("rows"),
        Column("tokens"),
        Column("samples"),
        Column("skipped"),
    ]
    return table("Calibration data", columns, [_component(one) for one in found])


def _component(one: ComponentRecord) -> list[Cell]:
    is_on_hub = one.revision is not None
    name = hub_link(one.name, "datasets/", one.title) if is_on_hub else code(one.title)
    return [
        words(one.title, name),
        words(one.revision[:12]) if one.revision else missing("a local text"),
        count(one.rows),
        count(one.tokens),
        count(one.samples) if one.samples else missing("cut from text"),
        count(one.skipped),
    ]


def caveats(facts: ReportFacts) -> Html:
    """The section of what one should know."""
    return section(
        "caveats", "What to know", element("ul", [element("li", one) for one in _caveats(facts)])
    )


def _caveats(facts: ReportFacts) -> Iterator[Child]:
    for caveat in facts.manifest.caveats:
        yield f"{caveat}."
    if facts.is_pruned:
        yield _of_pruning(facts.manifest.pruning)
    evaluation = facts.evaluation
    if evaluation is None:
        yield "Quality was not measured. Bits per weight alone do not say how good a file is."
        return
    if evaluation.engine == "streamed" and evaluation.of_kind("gguf"):
        yield (
            "GGUF files were evaluated by their weights, in full precision. llama.cpp also rounds "
            "activations, so its own figures differ slightly."
        )
    if evaluation.text is not None:
        yield (
            "Perplexity and KL divergence hold for the text that was scored. They compare with "
            "figures of other models only if tokenizer, text and chunks are the same."
        )
        yield (
            "Standard errors take tokens as independent of one another, as llama-perplexity does. "
            "Neighbouring tokens are not, so the true errors are larger."
        )
    if not evaluation.tasks:
        yield "No tasks were run: how well the model follows instructions was not measured."


def _of_pruning(pruning: PruningRecord) -> str:
    """What was done to the weights, and what that may have lost."""
    if pruning.merge is not None:
        return (
            "Nothing was trained by gradients. Experts were merged by what they did on the "
            "calibration texts, so abilities that those texts do not show may be lost more than "
            "these figures say."
        )
    trained = "Nothing was retrained."
    if pruning.repair is not None:
        trained = (
            "The weights of the kept experts were fitted to the calibration texts by least "
            "squares; nothing was trained by gradients."
        )
    if observes_nothing(pruning.method):
        return f"{trained} No text decided which experts go, so any ability may be lost."
    return (
        f"{trained} Experts that the calibration texts did not use are gone, so abilities that "
        "those texts do not show may be lost more than these figures say."
    )


def provenance(facts: ReportFacts) -> Html:
    """The section of command, versions, hashes and checks."""
    return section(
        "provenance",
        "How it was made",
        _command(facts),
        _options(facts),
        _checks(facts),
        _versions(facts),
        _hashes(facts),
        details("Recipes", [_recipe(one.file, one.recipe_source) for one in facts.manifest.gguf]),
    )


def _recipe(file: str, source: str) -> list[Html]:
    shown = element("pre", element("code", lines(source.rstrip("\n"))), tabindex=0)
    return [element("h4", code(file)), shown if source else absent("It was made elsewhere.")]


def _command(facts: ReportFacts) -> list[Html]:
    manifest = facts.manifest
    if manifest.options is None:
        return [absent("The options of the build are not recorded.")]
    source = manifest.source
    model, note = argument(source.name), None
    if not repository(source.label):
        what = "MODEL is the folder of " if source.gguf is None else "MODEL is the file "
        model, note = "MODEL", paragraph(what, code(source.name), ".")
    return [
        element("h3", "Build it again"),
        commands(f"reap2gguf build {model} --like {MANIFEST_FILE}"),
        *([note] if note else []),
    ]


def _options(facts: ReportFacts) -> Html | None:
    options = facts.manifest.options
    if options is None:
        return None
    rows = [
        [words(entry.name.replace("_", " ")), words(_value(getattr(options, entry.name)))]
        for entry in fields(options)
        if entry.name != "inputs"
    ]
    columns = [Column("option", is_number=False), Column("value", is_number=False)]
    recipes = [[words("recipe"), words(one.recipe or "none: added")] for one in facts.manifest.gguf]
    return details("Options", table("Options of the build", columns, [*rows, *recipes]))


def _value(value: object) -> str:
    if value is None:
        return "not given"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _checks(facts: ReportFacts) -> Html:
    verification = facts.manifest.verification
    passed = verification.get("passed")
    summary = str(verification.get("summary", "The files were not verified"))
    if not isinstance(passed, list) or not passed:
        return paragraph(f"{summary}.")
    checks = element("ul", [element("li", str(one)) for one in passed])
    return details(f"Verified: {summary}", checks)


def _versions(facts: ReportFacts) -> Html:
    manifest = facts.manifest
    rows = [[words("build"), words(name), words(n)] for name, n in manifest.program.items()]
    for stage, versions in manifest.made_with.items():
        rows += [[words(stage), words(name), words(number)] for name, number in versions.items()]
    for record in manifest.gguf:
        rows += [[words(record.file), words(k), words(v)] for k, v in record.made_by.items()]
    if facts.evaluation is not None:
        made = facts.evaluation.made_with
        rows += [[words("evaluation"), words(name), words(number)] for name, number in made.items()]
        where = f"{facts.evaluation.dtype} on {facts.evaluation.device}"
        rows.append([words("evaluation"), words("computed in"), words(where)])
    columns = [Column(title, is_number=False) for title in ("what", "library", "version")]
    title = "Versions"
    return details(title, table(title, columns, rows))


def _hashes(facts: ReportFacts) -> Html:
    columns = [Column("file", is_number=False), Column("size"), Column("SHA-256", is_number=False)]
    rows = [
        [words(name, code(name)), _size(n_bytes), _hash(sha256)]
        for name, n_bytes, sha256 in _files(facts)
    ]
    title = "Hashes"
    return details(title, table("SHA-256 of inputs and files", columns, rows))


def _size(n_bytes: int | None) -> Cell:
    return missing("\u2013") if n_bytes is None else byte_size(n_bytes)


def _hash(sha256: str | None) -> Cell:
    return words(sha256, code(sha256)) if sha256 else missing(_NOT_RECORDED)


def _files(facts: ReportFacts) -> Iterator[tuple[str, int | None, str | None]]:
    """Name, bytes and hash of what went in and came out."""
    manifest = facts.manifest
    yield "source (fingerprint)", manifest.source.n_bytes, manifest.source.fingerprint
    if manifest.pruning.method in OBSERVED:
        yield "calibration rows", None, manifest.calibration.sha256
        yield "observations", None, manifest.pruning.observations_sha256
    if facts.evaluation is not None and facts.evaluation.text is not None:
        yield f"text scored: {facts.evaluation.text.label}", None, facts.evaluation.text.sha256
    if manifest.options is not None:
        for one in manifest.options.inputs:
            yield f"{one.option} {one.name}", None, one.sha256
    if manifest.hf is not None:
        for name, file in manifest.hf.files.items():
            yield f"{manifest.hf.folder}/{name}", file.n_bytes, file.sha256
    for record in manifest.gguf:
        whole = record.n_bytes if len(record.files) == 1 else None
        for part in record.files:
            yield part, whole, facts.hashes.get(part)
    for side in manifest.side_files:
        yield side.file, side.n_bytes, facts.hashes.get(side.file)
    others = (IMATRIX_FILE, IMATRIX_DAT_FILE, CALIBRATION_FILE, MODELFILE)
    yield from ((name, None, facts.hashes[name]) for name in others if name in facts.hashes)
