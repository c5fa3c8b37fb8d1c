"""How a bundle was made, in a card: method, kept experts, calibration, command and versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from reap2gguf.bundle.card_blocks import blocks_text
from reap2gguf.bundle.card_calibration import calibration_table
from reap2gguf.bundle.card_merge import (
    MERGED_WEIGHTS,
    citation,
    groups_table,
    merge_section,
    merge_sentence,
    n_merged,
)
from reap2gguf.bundle.card_repair import changed_weights, repair_section
from reap2gguf.bundle.layout import (
    MANIFEST_FILE,
    OBSERVATIONS_FILE,
    SALIENCY_PICTURE,
    USAGE_PICTURE,
)
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.markdown import (
    argument,
    code,
    inline,
    picture,
    ranges,
    repository,
    table,
)
from reap2gguf.bundle.wording import wording
from reap2gguf.checkpoint.quantized.keys import WRITTEN_AS_BF16
from reap2gguf.pruning.methods import GIVEN, OBSERVED, is_from_weights, words_of

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.bundle.options_record import OptionsRecord
    from reap2gguf.bundle.records import MergeRecord, PruningRecord

_AIMER = "https://arxiv.org/abs/2603.18492"
_MOST_NAMED = 64  # protected experts in a card
_MOST_IDS = 20_000  # in a card; more are only in the manifest
_LISTED = (
    "reap2gguf",
    "ggml",
    "ik-llama-cpp-python",
    "torch",
    "transformers",
    "python",
    "reap2gguf commit",
)
_REAP_CITATION = """\
@article{lasby-reap,
  title   = {{REAP} the Experts: Why Pruning Prevails for One-Shot {MoE} Compression},
  author  = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and Ioannou, Yani
             and Thangarasa, Vithursan},
  journal = {arXiv preprint arXiv:2510.13999},
  year    = {2025}
}"""


def experts_section(manifest: Manifest) -> str:
    """Which experts remain, with the pictures of them; "" if nothing was pruned."""
    pruning = manifest.pruning
    if pruning.method == NO_METHOD:
        return ""
    parts = ["## Experts"]
    if SALIENCY_PICTURE in manifest.pictures:
        parts.append(picture("Saliency of the experts of each layer", SALIENCY_PICTURE))
    if USAGE_PICTURE in manifest.pictures:
        parts.append(picture("Usage of the experts before and after pruning", USAGE_PICTURE))
    parts.append(_merged_ones(pruning.merge) if pruning.merge is not None else _kept_ones(pruning))
    if manifest.has_observations:
        parts.append(
            f"What was observed of each expert is in `{OBSERVATIONS_FILE}` beside the GGUF files: "
            f"`reap2gguf build --observations {OBSERVATIONS_FILE} --compression R` prunes the same "
            "source at another ratio without observing it again."
        )
    return "\n\n".join(parts)


def _kept_ones(pruning: PruningRecord) -> str:
    """The experts of each layer that are kept, or those that are removed: the fewer."""
    names_kept = pruning.n_kept <= pruning.n_experts - pruning.n_kept
    what = "kept" if names_kept else "removed"
    rows = [
        (str(layer), ranges(ids if names_kept else _others(ids, pruning.n_experts)))
        for layer, ids in sorted(pruning.kept.items())
    ]
    if len(rows) * min(pruning.n_kept, pruning.n_experts - pruning.n_kept) > _MOST_IDS:
        return f"`{MANIFEST_FILE}` lists the experts that each layer keeps."
    found = table(("layer", f"{what} experts, by their numbers in the source"), rows)
    return _folded(f"Experts {what} in each layer", found)


def _merged_ones(merge: MergeRecord) -> str:
    """Which experts of each layer became one; all others stay as they are."""
    if n_merged(merge) > _MOST_IDS:
        return f"`{MANIFEST_FILE}` lists the experts that became one in each layer."
    found = _folded("Experts merged in each layer", groups_table(merge))
    return f"{found}\n\nExperts that are not named are those of the source."


def _folded(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _others(ids: Iterable[int], n_experts: int) -> list[int]:
    kept = set(ids)
    return [number for number in range(n_experts) if number not in kept]


def method_section(manifest: Manifest) -> str:
    """What was done, on what, and by which command."""
    pruning = manifest.pruning
    matrix = f"The\nimportance matrix was computed on the {wording(pruning).model} model."
    if pruning.method == NO_METHOD:
        matrix = "The\nimportance matrix was computed on the source."
    if not manifest.has_imatrix:
        matrix = ""
    elif manifest.calibration.is_of_observations:
        matrix = "The\nimportance matrix was taken on the source, by the pass that ranked experts."
    elif manifest.calibration.imatrix_file is not None:
        matrix = "The\nimportance matrix was not computed in this build."
    if pruning.method == NO_METHOD:
        return f"""## How it was made

{_from_source(manifest)} nothing was removed, and nothing was retrained. {matrix}
Calibration used text only. `{MANIFEST_FILE}` records versions, hashes and the type of each tensor.

{calibration_table(manifest)}

{_made_with(manifest)}"""
    rest = f"{_what_stays(manifest)} {matrix}".rstrip()
    repaired = f"\n\n{found}" if (found := repair_section(manifest)) else ""
    cited = _REAP_CITATION
    if pruning.merge is not None:
        cited = citation(pruning.merge)
        if pruning.merge.method == "ream":  # whose centroids are REAP's best experts
            cited = f"{cited}\n\n{_REAP_CITATION}"
        rest = f"The merged\nsafetensors {_what_is_kept(manifest)}{MERGED_WEIGHTS} {matrix}"
        repaired = f"\n\n{merge_section(manifest, pruning.merge)}"
    return f"""## How it was made

{_observed(manifest)}
{_score(pruning)} {rest}
Calibration used text only. `{MANIFEST_FILE}`
records versions, hashes, the experts kept in each layer, and the type of each tensor.{repaired}
{_protected(pruning)}
{calibration_table(manifest)}

{_made_with(manifest)}

```bibtex
{cited}
```"""


def _what_stays(manifest: Manifest) -> str:
    """What became of the weights that were not removed."""
    if manifest.source.gguf is None:
        kept = _what_is_kept(manifest)
        return f"The pruned\nsafetensors {kept}{changed_weights(manifest)}"
    return blocks_text(manifest)


def _observed(manifest: Manifest) -> str:
    """What ranked the experts: a calibration pass, here or before."""
    pruning = manifest.pruning
    if pruning.method == GIVEN:
        return "The experts that stay were named in a list: nothing was observed for it."
    if is_from_weights(pruning.method):
        return "The experts were ranked by their weights alone: no text was read for it."
    if not pruning.n_tokens:
        return "What the experts were ranked on is not recorded."
    skipped = ""
    if pruning.n_dropped_rows:
        skipped = f" ({pruning.n_dropped_rows:,} rows with NaN or infinite values were skipped)"
    before = ""
    if pruning.observations_file is not None:
        before = f" Its observations were reused from the file {code(pruning.observations_file)}."
    held = ""
    if manifest.choice is not None:
        text = manifest.choice.held_out
        held = f" {text.n_rows:,} rows were held out to choose the method, and ranked no experts."
    if pruning.merge is not None:
        return f"A calibration pass merged the experts on {pruning.n_tokens:,} tokens."
    return (
        f"A calibration pass ran the source model on {pruning.n_tokens:,} tokens{skipped}."
        f"{held}{before}"
    )


def _made_with(manifest: Manifest) -> str:
    """The program, its versions, and the command that builds the same again."""
    made = f"Made with reap2gguf {inline(manifest.card_version or '?')}."
    versions = ", ".join(
        f"{name} {inline(found)}" for name in _LISTED if (found := manifest.program.get(name))
    )
    parts = [f"{made} Versions of the build: {versions}." if versions else made]
    if manifest.options is not None:
        source = manifest.source
        model = "" if repository(source.label) else "MODEL "
        needed = f", where MODEL is {code(source.name)}" if model else ""
        parts[0] += f" Reproduce: `reap2gguf build {model}--like {MANIFEST_FILE}`{needed}."
        command = " \\\n  ".join(_command(manifest, manifest.options))
        parts.append(f"Its options, written out:\n\n```bash\n{command}\n```")
    return "\n\n".join(parts)


def _command(manifest: Manifest, options: OptionsRecord) -> Iterator[str]:
    """The build as one command, a line per option; files are named by the last part of a path."""
    source = manifest.source
    yield f"reap2gguf build {argument(source.at_commit or source.name)}"
    for record in manifest.gguf:
        if not record.adopted:
            yield f"--recipe {argument(record.recipe)}"
    yield from _given(_which_experts(manifest, options))
    yield from _given(_which_texts(options))
    yield f"--device {argument(options.device)}"
    yield f"--dtype {argument(options.dtype)}"


def _given(options: Iterable[tuple[str, object]]) -> Iterator[str]:
    """Options with their values; None: it was not given, True: it takes no value."""
    for name, value in options:
        if value is not None:
            yield name if value is True else f"{name} {argument(str(value))}"


def _which_experts(
    manifest: Manifest, options: OptionsRecord
) -> Iterator[tuple[str, object | None]]:
    """The options that say which experts stay, and what is done to them."""
    prunes = manifest.pruning.method != NO_METHOD
    if options.kept is not None:
        yield "--kept", options.kept
    elif prunes:
        yield "--keep-experts", manifest.pruning.n_kept
        yield "--method", options.method
        yield "--candidates", options.candidates
        yield "--choose-text", options.choose_text
    else:
        yield "--compression", 0
    yield "--group-size", options.group_size
    yield "--repair", options.repair if options.repair != "none" and prunes else None
    yield "--protect", options.protect or None
    yield "--protect-super-experts", options.protect_super_experts or None
    yield "--mtp", options.mtp
    yield "--dequantize", options.dequantize


def _which_texts(options: OptionsRecord) -> Iterator[tuple[str, object | None]]:
    """The options that say what is read, and how."""
    yield "--observations", options.observations
    yield "--calibration", options.spec
    yield "--samples", options.samples
    yield "--max-length", options.max_length
    yield ("--pack" if options.pack else "--no-pack"), True
    yield "--seed", options.seed
    yield "--imatrix", options.imatrix
    yield "--imatrix-from", options.imatrix_from if options.imatrix_from != "pruned" else None
    yield "--imatrix-text", options.imatrix_text
    yield "--chunk", options.chunk
    yield "--imatrix-chunks", options.imatrix_chunks


def _from_source(manifest: Manifest) -> str:
    if manifest.source.gguf is not None:
        return f"{blocks_text(manifest)}\nOf the experts,"
    if manifest.hf is None:
        return "The GGUF files were made from the weights of the source as they are:"
    return "The safetensors keep the weights of the source byte for byte:"


def _what_is_kept(manifest: Manifest) -> str:
    if WRITTEN_AS_BF16 in manifest.caveats:
        return "hold all other weights of the source, decoded and rounded to BF16"
    return "keep all other weights of the source byte for byte"


def _score(pruning: PruningRecord) -> str:
    if pruning.merge is not None:
        return merge_sentence(pruning.merge)
    removed = "were removed from each layer."
    if pruning.method == GIVEN:
        return f"All other experts {removed}"
    return f"{_score_alone(pruning.method)} The experts with the lowest scores {removed}"


def _score_alone(method: str) -> str:
    if method == "reap":
        return (
            "An expert's score is the mean of its gate weight times the norm of its output, over "
            "all tokens routed to it ([REAP](https://arxiv.org/abs/2510.13999))."
        )
    if not (words := words_of(method)):
        return f"Experts were ranked by {code(method)}."
    routed = "" if is_from_weights(method) else ", over all tokens routed to it"
    source = f" ([AIMER]({_AIMER}))" if method == "aimer" else ""
    return f"An expert's score is {words}{routed} ({code(method)}){source}."


def _protected(pruning: PruningRecord) -> str:
    """The experts that stay whatever they score, in a sentence; "" if there are none."""
    parts = []
    for experts, what in (
        (pruning.protected, "named by hand"),
        (pruning.super_experts, "with outliers in their outputs (super experts)"),
    ):
        if total := sum(map(len, experts.values())):
            layers = "; ".join(f"layer {k}: {ranges(ids)}" for k, ids in sorted(experts.items()))
            named = f" ({layers})" if total <= _MOST_NAMED else ""
            parts.append(f"{total:,} {what}{named}")
    if not parts:
        return ""
    return f"\nExperts that stay whatever they score: {', and '.join(parts)}.\n"


def caveats_section(manifest: Manifest, caveats: Iterable[str]) -> str:
    """What a user should know; `caveats` are safe Markdown, one sentence or more each."""
    lines = [f"- {caveat}" for caveat in caveats]
    if manifest.pruning.method in OBSERVED:
        lines.append(
            "- Experts were chosen by the calibration texts above. Languages and topics that "
            "these lack may have lost more than the figures show."
        )
    if manifest.pruning.merge is not None:
        lines.append(
            "- Experts were merged by what they did on the calibration text. Measure the model on "
            "text of your own domain, beside one whose experts were removed."
        )
    if manifest.pruning.repair is not None:
        lines.append(
            "- The repair was fitted on the calibration text. Measure it on text of your own "
            "domain, beside the same model without it."
        )
    if manifest.side_files:
        lines.append("- Calibration and evaluation used text only: images were not measured.")
    if manifest.evaluation is None or manifest.evaluation.text is None:
        lines.append("- Nothing was measured of the quality of these files.")
    elif not manifest.evaluation.tasks:
        lines.append("- No tasks were measured: the figures are those of one text.")
    return "## Caveats\n\n" + "\n".join(lines) if lines else ""
