"""How a bundle was made, in a card: method, kept experts, calibration, command and versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from reap2gguf.bundle.card_blocks import blocks_text
from reap2gguf.bundle.card_calibration import calibration_table
from reap2gguf.bundle.card_merge import MERGED_WEIGHTS, merge_section, merge_sentence
from reap2gguf.bundle.card_repair import changed_weights, repair_section
from reap2gguf.bundle.layout import (
    MANIFEST_FILE,
    OBSERVATIONS_FILE,
    SALIENCY_PICTURE,
    USAGE_PICTURE,
)
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.markdown import argument, code, inline, picture, repository, table
from reap2gguf.checkpoint.quantized.keys import WRITTEN_AS_BF16
from reap2gguf.pruning.methods import GIVEN, OBSERVED, is_from_weights, words_of

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.bundle.options_record import OptionsRecord
    from reap2gguf.bundle.records import PruningRecord

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
    names_kept = pruning.n_kept <= pruning.n_experts - pruning.n_kept
    what = "kept" if names_kept else "removed"
    rows = [
        (str(layer), _ranges(ids if names_kept else _others(ids, pruning.n_experts)))
        for layer, ids in sorted(pruning.kept.items())
    ]
    n_ids = len(rows) * min(pruning.n_kept, pruning.n_experts - pruning.n_kept)
    if n_ids <= _MOST_IDS:
        found = table(("layer", f"{what} experts, by their numbers in the source"), rows)
        summary = f"<summary>Experts {what} in each layer</summary>"
        parts.append(f"<details>\n{summary}\n\n{found}\n\n</details>")
    else:
        parts.append(f"`{MANIFEST_FILE}` lists the experts that each layer keeps.")
    if manifest.has_observations:
        parts.append(
            f"What was observed of each expert is in `{OBSERVATIONS_FILE}` beside the GGUF files: "
            f"`reap2gguf build --observations {OBSERVATIONS_FILE} --compression R` prunes the same "
            "source at another ratio without observing it again."
        )
    return "\n\n".join(parts)


def _others(ids: Iterable[int], n_experts: int) -> list[int]:
    kept = set(ids)
    return [number for number in range(n_experts) if number not in kept]


def _ranges(ids: Sequence[int]) -> str:
    """Numbers in ascending order, with runs of three and more shortened: 1, 4-7."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts: list[str] = []
    for first, last in runs:
        parts += [f"{first}-{last}"] if last - first > 1 else map(str, range(first, last + 1))
    return ", ".join(parts) or "none"


def method_section(manifest: Manifest) -> str:
    """What was done, on what, and by which command."""
    pruning = manifest.pruning
    matrix = "The\nimportance matrix was computed on the pruned model."
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
    rest = f"{_what_stays(manifest)} {matrix}"
    repaired = f"\n\n{found}" if (found := repair_section(manifest)) else ""
    if pruning.merge is not None:
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
{_REAP_CITATION}
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
        model = "" if repository(manifest.source.label) else "MODEL "
        needed = f", where MODEL is {code(manifest.source.label)}" if model else ""
        parts[0] += f" Reproduce: `reap2gguf build {model}--like {MANIFEST_FILE}`{needed}."
        command = " \\\n  ".join(_command(manifest, manifest.options))
        parts.append(f"Its options, written out:\n\n```bash\n{command}\n```")
    return "\n\n".join(parts)


def _command(manifest: Manifest, options: OptionsRecord) -> Iterator[str]:
    """The build as one command, a line per option; files are named by the last part of a path."""
    label, revision = manifest.source.label, manifest.source.revision
    is_hub = repository(label) is not None
    yield f"reap2gguf build {argument(f'{label}@{revision}' if is_hub and revision else label)}"
    for record in manifest.gguf:
        if not record.adopted:
            yield f"--recipe {argument(record.recipe)}"
    if options.kept is not None:
        yield f"--kept {argument(options.kept)}"
    elif manifest.pruning.method != NO_METHOD:
        yield f"--keep-experts {manifest.pruning.n_kept}"
        yield f"--method {argument(options.method)}"
        if options.candidates is not None:
            yield f"--candidates {argument(options.candidates)}"
        if options.choose_text is not None:
            yield f"--choose-text {argument(options.choose_text)}"
    else:
        yield "--compression 0"
    if options.group_size is not None:
        yield f"--group-size {options.group_size}"
    if options.repair != "none" and manifest.pruning.method != NO_METHOD:
        yield f"--repair {argument(options.repair)}"
    if options.protect:
        yield f"--protect {argument(options.protect)}"
    if options.protect_super_experts:
        yield "--protect-super-experts"
    yield f"--mtp {argument(options.mtp)}"
    if options.dequantize is not None:
        yield f"--dequantize {argument(options.dequantize)}"
    if options.observations is not None:
        yield f"--observations {argument(options.observations)}"
    yield f"--calibration {argument(options.spec)}"
    yield f"--samples {options.samples}"
    yield f"--max-length {options.max_length}"
    yield "--pack" if options.pack else "--no-pack"
    yield f"--seed {options.seed}"
    if options.imatrix is not None:
        yield f"--imatrix {argument(options.imatrix)}"
    if options.imatrix_from != "pruned":
        yield f"--imatrix-from {argument(options.imatrix_from)}"
    if options.imatrix_text is not None:
        yield f"--imatrix-text {argument(options.imatrix_text)}"
    yield f"--chunk {options.chunk}"
    if options.imatrix_chunks is not None:
        yield f"--imatrix-chunks {options.imatrix_chunks}"
    yield f"--device {argument(options.device)}"
    yield f"--dtype {argument(options.dtype)}"


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
            layers = "; ".join(f"layer {k}: {_ranges(ids)}" for k, ids in sorted(experts.items()))
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
