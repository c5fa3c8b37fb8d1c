"""What a card says of the calibration: texts, coverage of the experts, importance matrix."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import (
    CALIBRATION_FILE,
    IMATRIX_DAT_FILE,
    IMATRIX_FILE,
    MANIFEST_FILE,
)
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.markdown import code, hub_link, inline, table
from reap2gguf.bundle.wording import wording
from reap2gguf.pruning.methods import observes_nothing

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import (
        CalibrationRecord,
        ComponentRecord,
        Manifest,
        PruningRecord,
    )

_PACKED = """\
Samples were packed: each row holds several samples, as in REAP's default. The last sample of a row
was cut off at the row's end, and a token may attend to the samples before its own."""


def imatrix_text(manifest: Manifest) -> str:
    """What the importance matrix was computed on, as far as it is known."""
    calibration = manifest.calibration
    if not manifest.has_imatrix:
        return ""
    pruning = manifest.pruning
    whose = f"{wording(pruning).model} " if pruning.n_kept < pruning.n_experts else ""
    dat = f"`{IMATRIX_DAT_FILE}` is the same in the older format that ik_llama.cpp reads.\n"
    if calibration.imatrix_file is None:
        return (
            f"`{IMATRIX_FILE}` is the importance matrix of the {whose}model, computed on\n"
            f"{_chunks(calibration)} of\n`{CALIBRATION_FILE}`; {dat}"
        )
    text = code(calibration.imatrix_text) if calibration.imatrix_text else "a text it does not name"
    if calibration.is_of_observations:
        return (
            f"`{IMATRIX_FILE}` is an importance matrix of the model before pruning, taken in the "
            f"pass that ranked the experts, on\n{_rows(calibration)} of {text}. Of "
            f"{calibration.imatrix_cut_from} experts per layer, it has those that were kept. {dat}"
        )
    cut = ""
    if calibration.imatrix_cut_from is not None:
        cut = (
            f"It was made of the model before pruning: of {calibration.imatrix_cut_from} experts "
            "per layer, it has\nthose that were kept. "
        )
    return (
        f"`{IMATRIX_FILE}` is an importance matrix that was not computed in this build: it comes "
        f"from the file\n{code(calibration.imatrix_file)}, which records {_chunks(calibration)} of "
        f"{text}. {cut}{dat}{_given_text(manifest)}"
    )


def _given_text(manifest: Manifest) -> str:
    return (
        f"`{CALIBRATION_FILE}` is the text that was given with it.\n" if manifest.has_text else ""
    )


def _chunks(calibration: CalibrationRecord) -> str:
    """How much of its text the importance matrix was computed on."""
    count, total = calibration.imatrix_chunks or 0, calibration.imatrix_text_chunks
    n_tokens = calibration.imatrix_chunk_size
    size = f"chunks of {n_tokens:,} tokens" if n_tokens else "chunks"
    if not total:
        return f"{count:,} {size}"
    if count == total:
        return f"all {count:,} {size}"
    return f"{count:,} of {total:,} {size}, spread over the text,"


def _rows(calibration: CalibrationRecord) -> str:
    """How many rows an importance matrix was taken on that came with the observations."""
    return (
        f"{calibration.imatrix_chunks or 0:,} rows of at most "
        f"{calibration.imatrix_chunk_size or 0:,} tokens"
    )


def coverage_rows(pruning: PruningRecord) -> list[tuple[str, str]]:
    """A row that says how many tokens the experts were ranked by."""
    if (coverage := pruning.coverage) is None:
        return []
    n_experts = pruning.n_experts * len(pruning.kept)
    text = f"median {coverage.median:,} tokens per expert, fewest {coverage.fewest:,}"
    parts = (
        ("never seen", coverage.n_unseen, coverage.n_unseen_kept),
        (f"under {coverage.thin_below:,} tokens", coverage.n_thin, coverage.n_thin_kept),
    )
    for what, count, n_kept in parts:
        if count:
            text += f"; {what}: {count:,} of {n_experts:,} experts, {n_kept:,} of them kept"
    return [("calibration coverage", text)]


def importance(manifest: Manifest) -> str:
    """How much the importance matrix was computed on, and how much of it the experts saw."""
    calibration, pruning = manifest.calibration, manifest.pruning
    is_of_rows = calibration.is_of_observations
    text = _rows(calibration) if is_of_rows else _chunks(calibration).rstrip(",")
    n_experts = pruning.n_kept * len(pruning.kept)
    if (covered := calibration.imatrix_coverage) is not None:
        n_experts = sum(map(len, covered.tokens.values()))
        text += f"; median {covered.median:,} tokens per expert, fewest {covered.fewest:,}"
        if covered.n_few:
            text += (
                f"; {covered.n_few:,} of {n_experts:,} experts ({covered.n_few / n_experts:.1%}) "
                f"saw under {covered.few_below:,} tokens"
            )
    if calibration.imatrix_unseen:
        text += (
            f"; no token reached {calibration.imatrix_unseen:,} of {n_experts:,} experts, which "
            "are quantized unweighted, as by llama-quantize"
        )
    return text


def importance_table(manifest: Manifest) -> str:
    """Tokens of the importance matrix per layer, folded; "" where they are not known."""
    covered = manifest.calibration.imatrix_coverage
    if covered is None:
        return ""
    rows = [
        (
            str(layer),
            f"{min(tokens):,}",
            f"{int(median(tokens)):,}",
            _of(sum(count < covered.few_below for count in tokens), len(tokens)),
            str(sum(count == 0 for count in tokens)),
        )
        for layer, tokens in sorted(covered.tokens.items())
    ]
    few = f"under {covered.few_below:,} tokens"
    found = table(("layer", "fewest tokens", "median", few, "never hit"), rows)
    summary = "<summary>Tokens of the importance matrix that the experts saw</summary>"
    more = f"`{MANIFEST_FILE}` has the tokens of every expert."
    return f"<details>\n{summary}\n\n{found}\n\n{more}\n\n</details>"


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / total:.1%})"


def calibration_facts(manifest: Manifest) -> str:
    """What ranked the experts, or else what the importance matrix was computed on."""
    pruning, calibration = manifest.pruning, manifest.calibration
    spec = "not known" if calibration.spec is None else inline(calibration.spec)
    seed = "" if calibration.seed is None else f", seed {calibration.seed}"
    if pruning.method == NO_METHOD or observes_nothing(pruning.method):
        text = inline(calibration.spec or calibration.imatrix_text or "a text that is not known")
        return f"{text}, for the importance matrix only{seed}"
    if not pruning.n_rows:
        return spec
    length, file = calibration.max_length, pruning.observations_file
    most = "" if length is None else f" of at most {length:,} tokens"
    packed = ", samples packed" if calibration.packed else ""
    reused = "" if file is None else f", reused from {inline(file)}"
    if manifest.choice is not None:
        reused += f"; {manifest.choice.held_out.n_rows:,} more rows chose the method"
    return (
        f"{spec}: {pruning.n_rows:,} rows{most}{packed}, {pruning.n_tokens:,} tokens in total"
        f"{seed}{reused}"
    )


def at_revision(revision: str | None) -> str:
    return f" at {inline(revision[:12])}" if revision else ""


def calibration_table(manifest: Manifest) -> str:
    """How much of each dataset and file was used."""
    rows = [
        (_component(record), f"{record.rows:,}", f"{record.tokens:,}", _samples(record))
        for record in manifest.calibration.components
    ]
    if not rows:
        return "The calibration data is not listed."
    found = table(("calibration data", "rows", "tokens", "samples"), rows)
    has_samples = any(record.samples for record in manifest.calibration.components)
    return f"{found}\n\n{_PACKED}" if manifest.calibration.packed and has_samples else found


def _samples(record: ComponentRecord) -> str:
    return f"{record.samples:,}" if record.samples else "cut from text"


def _component(record: ComponentRecord) -> str:
    """A dataset with its link and commit, or the name of a file, for a table cell."""
    if record.revision is None:
        return code(record.title)
    return hub_link(record.name, "datasets/", record.title) + at_revision(record.revision)
