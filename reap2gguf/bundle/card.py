"""The card (README.md) of each folder: front matter, how to use the files, this build's numbers.

Every text that comes from a file or an argument goes through `bundle/markdown.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.card_budget import budget_section
from reap2gguf.bundle.card_calibration import (
    at_revision,
    calibration_facts,
    coverage_rows,
    imatrix_text,
    importance,
    importance_table,
)
from reap2gguf.bundle.card_candidates import candidates_section
from reap2gguf.bundle.card_files import CardNames, caveats, files_section, use_section
from reap2gguf.bundle.card_making import caveats_section, experts_section, method_section
from reap2gguf.bundle.card_quality import quality_section
from reap2gguf.bundle.card_repair import repair_summary
from reap2gguf.bundle.front_matter import PrunedFrom, as_yaml, new_front_matter, pruned_values
from reap2gguf.bundle.layout import (
    SUMS_FILE,
    gguf_name,
)
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.markdown import (
    argument,
    code,
    hub_link,
    inline,
    quoted,
    repository,
    table,
)
from reap2gguf.bundle.sampling import read_sampling
from reap2gguf.bundle.source_card import read_card
from reap2gguf.bundle.wording import wording
from reap2gguf.messages import parameters, size
from reap2gguf.models.loading import classes_for_all, classes_of
from reap2gguf.pruning.methods import done_by, method_name

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import (
        Manifest,
        PruningRecord,
    )


def local_names(manifest: Manifest) -> CardNames:
    """The names of the folders that a build makes."""
    return CardNames(manifest.name, gguf_name(manifest.name))


def short_card(
    name: str, source_card: Path, pruned: PrunedFrom, kept_file: str, merged_by: str | None = None
) -> str:
    """The card of a pruned checkpoint that is no bundle: where it comes from, and its licence.

    `merged_by` is the method, if experts were merged.
    """
    front = as_yaml(pruned_values(read_card(source_card), pruned))
    source = hub_link(pruned.source) if repository(pruned.source) else code(pruned.source)
    what = (
        f"{source} without the experts that matter least, pruned by reap2gguf. `{kept_file}` lists "
        "the experts that each layer keeps."
    )
    if pruned.is_repaired:
        what += (
            " The `down_proj` of the remaining experts was repaired: it is not the source's, and "
            "the file says by how much it changed what each layer gives."
        )
    if merged_by is not None:
        what = (
            f"{source} with fewer experts: reap2gguf merged the others into those that stay, by "
            f"{inline(method_name(merged_by))}. `{kept_file}` lists the experts of each layer that "
            "became one, whose weights are not the source's."
        )
    return f"{front}# {inline(name)}\n\n{what}\n"


def hf_card(manifest: Manifest, source_card: Path) -> str:
    """The card of the safetensors folder."""
    front = new_front_matter(manifest, source_card, "transformers")
    return front + hf_body(manifest, local_names(manifest))


def hf_body(manifest: Manifest, names: CardNames) -> str:
    """The card of the safetensors, without its front matter."""
    folder = manifest.hf
    if folder is None:
        raise ValueError("the bundle has no safetensors, so they have no card")
    shards = _count_shards(folder.n_shards)
    use = f"""## Use it

{_transformers(manifest, names.hf)}

```bash
vllm serve {argument(names.hf)}
```

{_mtp_use(manifest, names.hf)}The weights take {size(folder.n_bytes)} in {shards}.
GGUF files for llama.cpp, Ollama and LM Studio are in {names.link(names.gguf)}."""
    return _sections(
        f"# {inline(_last(names.hf))}",
        _summary(manifest),
        f"## In numbers\n\n{_facts_table(manifest)}",
        use,
        quality_section(manifest, of_files=False),
        budget_section(manifest),
        candidates_section(manifest),
        experts_section(manifest),
        caveats_section(manifest, ()),
        method_section(manifest),
    )


def _sections(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _transformers(manifest: Manifest, name: str) -> str:
    """The classes that load all that the folder holds."""
    shown, architecture = quoted(name), manifest.source.architecture
    model, reader = classes_for_all(architecture, bool(manifest.side_files))
    code = f"""```python
from transformers import {model}, {reader}

{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained({shown})
model = {model}.from_pretrained({shown}, dtype="auto", device_map="auto")
```"""
    if model == classes_of(architecture).whole:
        return code
    return f"""{code}

For text alone, `AutoTokenizer` and `AutoModelForCausalLM` load it without the vision tower."""


def _mtp_use(manifest: Manifest, name: str) -> str:
    """How to use the MTP block, or what to know where it was dropped."""
    state = manifest.pruning.mtp.state
    if state == "dropped":
        return (
            "The MTP block of the source is left out. To convert this folder with llama.cpp's "
            "`convert_hf_to_gguf.py`, add `--no-mtp`.\n\n"
        )
    if state != "pruned":
        return ""
    config = '{"method": "mtp", "num_speculative_tokens": 1}'
    return f"""The MTP block can draft tokens (speculative decoding):

```bash
vllm serve {argument(name)} --speculative-config '{config}'
```

"""


def gguf_card(manifest: Manifest, source_card: Path, samples: bool | None = None) -> str:
    """The card of the GGUF folder.

    `samples` is as in `gguf_body`; if None, it is found in the generation config that lies beside
    the source's card.
    """
    front = new_front_matter(manifest, source_card, "gguf")
    if samples is None:
        samples = read_sampling(source_card.parent).is_recommended
    return front + gguf_body(manifest, local_names(manifest), samples)


def gguf_body(manifest: Manifest, names: CardNames, samples: bool = False) -> str:
    """The card of the GGUF files, without its front matter.

    `samples` says whether the model's generation config recommends a sampling.
    """
    weights = ""
    if manifest.source.gguf is not None:
        weights = (
            f"These files were made from the GGUF file {code(manifest.source.gguf.file)}: there "
            "are no safetensors of them."
        )
    elif manifest.hf is None:
        weights = f"For transformers and vLLM, use the safetensors of {_source_link(manifest)}."
    elif names.on_hub:
        weights = f"For transformers and vLLM, the safetensors are in {names.link(names.hf)}."
    check = f"To check the files after a download: `sha256sum -c {SUMS_FILE}`."
    return _sections(
        f"# {inline(gguf_name(_last(names.hf)))}",
        _summary(manifest),
        files_section(manifest, names),
        weights,
        f"{imatrix_text(manifest)}{check}",
        use_section(manifest, names, samples),
        quality_section(manifest, of_files=True),
        budget_section(manifest),
        candidates_section(manifest),
        experts_section(manifest),
        f"## In numbers\n\n{_facts_table(manifest)}",
        importance_table(manifest),
        caveats_section(manifest, caveats(manifest)),
        method_section(manifest),
    )


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _summary(manifest: Manifest) -> str:
    pruning, source = manifest.pruning, manifest.source
    if pruning.method == NO_METHOD:
        return (
            f"{_source_link(manifest)} with all of its experts: each MoE layer has "
            f"{pruning.n_experts}, {pruning.experts_per_token} active per token. Nothing was "
            f"pruned.{_earlier(manifest)}"
        )
    share = 1 - pruning.n_kept / pruning.n_experts
    method = inline(method_name(pruning.method))
    if pruning.merge is not None:
        return (
            f"{_source_link(manifest)} with {share:.0%} of its experts merged into the others by "
            f"{method}: each MoE layer has {pruning.n_kept} of "
            f"{pruning.n_experts} experts, {pruning.experts_per_token} active per token. "
            f"{parameters(manifest.n_parameters)} of {parameters(source.n_parameters)} parameters "
            f"remain.{_earlier(manifest)}"
        )
    return (
        f"{_source_link(manifest)} with {share:.0%} of its experts pruned by {method}: each MoE "
        f"layer keeps {pruning.n_kept} of {pruning.n_experts} experts, "
        f"{pruning.experts_per_token} active per token. {parameters(manifest.n_parameters)} of "
        f"{parameters(source.n_parameters)} parameters remain.{repair_summary(manifest)}"
        f"{_earlier(manifest)}"
    )


def _earlier(manifest: Manifest) -> str:
    """Sentences about an earlier pruning, which the source's own manifest records."""
    earlier, pruning = manifest.source.earlier, manifest.pruning
    if earlier is None:
        return ""
    original = code(earlier.label + at_revision(earlier.revision))
    methods = earlier.methods if pruning.merge is None else (*earlier.methods, pruning.method)
    left = (
        f"{pruning.n_kept} of these {earlier.n_experts} remain."
        if done_by(methods) == "pruned"
        else f"In place of these {earlier.n_experts} there are {pruning.n_kept}, which are not "
        "all the original's own: some were merged from several."
    )
    return (
        f" The source had been {done_by(earlier.methods)} before: its own record names {original} "
        f"with {earlier.n_experts} experts per layer as the original. {left}"
    )


def _source_link(manifest: Manifest) -> str:
    label = manifest.source.label
    return hub_link(label) if repository(label) else code(label)


def _facts_table(manifest: Manifest) -> str:
    pruning = manifest.pruning
    label, revision = manifest.source.label, at_revision(manifest.source.revision)
    rows = [
        ("source", (label if repository(label) else inline(label)) + revision),
        ("architecture", inline(manifest.source.architecture)),
        ("experts per layer", _experts(manifest)),
        ("active experts per token", str(pruning.experts_per_token)),
        ("parameters", f"{manifest.n_parameters:,}"),
        *([(_method_word(pruning), inline(pruning.method))] if pruning.method != NO_METHOD else []),
        *([("repair", inline(pruning.repair.kind))] if pruning.repair is not None else []),
        ("calibration", calibration_facts(manifest)),
        *coverage_rows(pruning),
        *([("importance matrix", importance(manifest))] if manifest.has_imatrix else []),
        ("checks", inline(str(manifest.verification.get("summary", "not run")))),
    ]
    if pruning.mtp.state != "none":
        rows.insert(-1, ("multi-token prediction (MTP)", _mtp(pruning)))
    return table(("property", "value"), rows)


def _method_word(pruning: PruningRecord) -> str:
    return "pruning method" if pruning.merge is None else "merging method"


def _experts(manifest: Manifest) -> str:
    pruning = manifest.pruning
    if pruning.n_kept == pruning.n_experts:
        return str(pruning.n_experts)
    return f"{pruning.n_kept} of {pruning.n_experts}"


def _mtp(pruning: PruningRecord) -> str:
    mtp = pruning.mtp
    if not mtp.n_tokens:
        return inline(mtp.state)
    before, after = mtp.hits_before / mtp.n_tokens, mtp.hits_after / mtp.n_tokens
    if mtp.state == "kept":
        return f"kept; top-1 accuracy {after:.1%}"
    like = " like the other layers" if pruning.change is None else ""
    return (
        f"{inline(mtp.state)}{like}; top-1 accuracy {before:.1%} before {wording(pruning).act}, "
        f"{after:.1%} after"
    )


def _count_shards(count: int) -> str:
    return "one file" if count == 1 else f"{count} shards"
