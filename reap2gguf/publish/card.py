"""The README.md of each folder: Hub front matter, this run's numbers, how to load the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from reap2gguf.artifacts.manifest import ComponentRecord, GgufRecord, Manifest, MtpRecord
from reap2gguf.messages import one_line

CARD_FILE = "README.md"
_MAX_CARD_BYTES = 2**20  # of the source; one of pictures says nothing here

_PACKED = """\
Samples were put one after another until a row was full, as REAP does by default; the rest of the
last sample in a row was left out, and a token may attend to the samples before its own."""

_REAP_CITATION = """\
@article{lasby-reap,
  title   = {{REAP} the Experts: Why Pruning Prevails for One-Shot {MoE} Compression},
  author  = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and Ioannou, Yani
             and Thangarasa, Vithursan},
  journal = {arXiv preprint arXiv:2510.13999},
  year    = {2025}
}"""


def hf_card(manifest: Manifest, source_card: Path) -> str:
    """The card of the safetensors folder."""
    folder, name = manifest.hf, manifest.name
    body = f"""# {name}

{_summary(manifest)}

{_facts_table(manifest)}

## Use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
```

```bash
vllm serve {name}
```

The weights are {_gib(folder.n_bytes)} in {_count_shards(manifest)}. GGUF files of the same model
are in `{name}-GGUF`.

{_method(manifest)}
"""
    return _front_matter(manifest, source_card, "transformers") + body


def gguf_card(manifest: Manifest, source_card: Path) -> str:
    """The card of the GGUF folder."""
    name = manifest.name
    rows = [_file_row(record) for record in manifest.gguf]
    rows += [f"| `{s.file}` | {_gib(s.n_bytes)} | 16 | {s.title} |" for s in manifest.side_files]
    files = "\n".join(rows)
    first = manifest.gguf[0].file
    body = f"""# {name}-GGUF

{_summary(manifest)}

## Files

| file | size | bits per weight | what it is |
|---|---|---|---|
{files}

{_honest_names(manifest.gguf)}`imatrix.gguf` (and `imatrix.dat` for programs that read no other)
is the importance matrix of the pruned model, over {manifest.calibration.imatrix_chunks} chunks of
{manifest.calibration.imatrix_chunk_size} tokens of `calibration.txt`. `SHA256SUMS` holds the hash
of every file: `sha256sum -c SHA256SUMS`.

## Use it

```bash
llama-cli -m {first}
llama-server -m {first}
```

{_facts_table(manifest)}

{_method(manifest)}
"""
    return _front_matter(manifest, source_card, "gguf") + body


def _front_matter(manifest: Manifest, source_card: Path, library: str) -> str:
    """YAML for the Hub, the licence taken over from the source's own card."""
    inherited = _source_data(source_card)
    values: dict[str, Any] = {
        key: inherited[key]
        for key in ("language", "license", "license_name", "license_link")
        if inherited.get(key) is not None
    }
    if "/" in manifest.source.label:
        values["base_model"] = manifest.source.label
        values["base_model_relation"] = "quantized" if library == "gguf" else "finetune"
    tags = ["reap", "moe", "expert-pruning", "pruned"]
    data = ModelCardData(
        library_name=library,
        pipeline_tag=inherited.get("pipeline_tag") or "text-generation",
        tags=[*tags, "gguf", "imatrix"] if library == "gguf" else tags,
        **values,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _source_data(source_card: Path) -> dict[str, Any]:
    if not source_card.is_file() or source_card.stat().st_size > _MAX_CARD_BYTES:
        return {}
    text = source_card.read_text(encoding="utf-8", errors="replace")
    try:
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        found = dict(data.to_dict())
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        # a card without readable front matter has no licence to inherit
        return {}
    return {key: value for key, value in found.items() if _is_words(value)}


def _is_words(value: Any) -> bool:
    """A short text, or a list of some: what a licence or a language may be."""
    words = value if isinstance(value, list) else [value]
    return len(words) <= 100 and all(isinstance(w, str) and len(w) <= 500 for w in words)


def _summary(manifest: Manifest) -> str:
    pruning, source = manifest.pruning, manifest.source
    share = 1 - pruning.n_kept / pruning.n_experts
    return (
        f"{_source_link(manifest)} with {share:.0%} of its experts removed by "
        f"{pruning.method.upper() if pruning.method == 'reap' else pruning.method}: each MoE layer "
        f"keeps {pruning.n_kept} of {pruning.n_experts} experts and routes every token to "
        f"{pruning.experts_per_token}. {_billions(manifest.hf.n_parameters)} of "
        f"{_billions(source.n_parameters)} parameters are left."
    )


def _source_link(manifest: Manifest) -> str:
    label = manifest.source.label
    return f"[{label}](https://huggingface.co/{label})" if "/" in label else f"`{label}`"


def _facts_table(manifest: Manifest) -> str:
    pruning, calibration = manifest.pruning, manifest.calibration
    packed = ", samples packed" if calibration.packed else ""
    text = (
        f"{calibration.spec}, {pruning.n_rows:,} rows of at most {calibration.max_length:,} "
        f"tokens{packed}, {pruning.n_tokens:,} in all, seed {calibration.seed}"
    )
    rows = [
        ("source", manifest.source.label + _at(manifest.source.revision)),
        ("architecture", manifest.source.architecture),
        ("experts a layer", f"{pruning.n_kept} of {pruning.n_experts}"),
        ("experts a token", str(pruning.experts_per_token)),
        ("parameters", f"{manifest.hf.n_parameters:,}"),
        ("criterion", pruning.method),
        ("calibration", text),
        ("checks", str(manifest.verification.get("summary", "not run"))),
    ]
    if pruning.mtp.state != "none":
        rows.insert(-1, ("multi-token prediction", _mtp(pruning.mtp)))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _mtp(mtp: MtpRecord) -> str:
    if not mtp.n_tokens:
        return mtp.state
    before, after = mtp.hits_before / mtp.n_tokens, mtp.hits_after / mtp.n_tokens
    return (
        f"{mtp.state} with the layers; {before:.1%} of next-next tokens right before, "
        f"{after:.1%} after"
    )


def _at(revision: str | None) -> str:
    return f" at {revision[:12]}" if revision else ""


def _file_row(record: GgufRecord) -> str:
    size = _gib(record.n_bytes)
    return f"| `{record.file}` | {size} | {record.bits_per_weight:.2f} | {record.title} |"


def _honest_names(records: Sequence[GgufRecord]) -> str:
    """Say what a label really is where it looks like a type that llama.cpp does not have."""
    lines = [
        f"`{record.label}` is llama.cpp's file type {record.file_type} with the recipe's "
        "overrides, not a type of its own."
        for record in records
        if record.label != record.file_type
    ]
    return " ".join(lines) + "\n\n" if lines else ""


def _method(manifest: Manifest) -> str:
    seen = manifest.pruning
    dropped = f", {seen.n_dropped_rows} rows not finite and left out" if seen.n_dropped_rows else ""
    return f"""## How it was made

One sweep over the source observed {seen.n_tokens:,} tokens{dropped}. {_score(seen.method)}
Stored tensors were sliced, not converted; everything else was copied byte for byte. The importance
matrix was taken from the pruned model. Calibration was text only. `reap2gguf.json` records
versions, hashes, the experts kept in every layer, and the type of every tensor.

{_calibration(manifest)}

Made with reap2gguf {manifest.program.get("reap2gguf", "")}.

```bibtex
{_REAP_CITATION}
```"""


def _calibration(manifest: Manifest) -> str:
    """What was read of each dataset and file."""
    lines = [
        f"| {_component(record)} | {record.rows:,} | {record.tokens:,} | {_samples(record)} |"
        for record in manifest.calibration.components
    ]
    if not lines:
        return "The calibration texts are not listed."
    table = "\n".join(["| calibration | rows | tokens | samples |", "|---|---|---|---|", *lines])
    has_samples = any(record.samples for record in manifest.calibration.components)
    return f"{table}\n\n{_PACKED}" if manifest.calibration.packed and has_samples else table


def _samples(record: ComponentRecord) -> str:
    return f"{record.samples:,}" if record.samples else "cut from text"


def _component(record: ComponentRecord) -> str:
    """A dataset with its link and commit, or the name of a file, fit for a cell of a table."""
    title = one_line(record.title).replace("|", "\\|")
    if record.revision is None:
        return f"`{title}`"
    commit = one_line(record.revision)[:12]
    return f"[{title}](https://huggingface.co/datasets/{record.name}) at {commit}"


def _score(method: str) -> str:
    if method == "reap":
        return (
            "An expert's score is the mean, over the tokens routed to it, of its gate weight times "
            "the norm of its output ([REAP](https://arxiv.org/abs/2510.13999))."
        )
    return f"Experts were ranked by `{method}`, one of the criteria that REAP is compared with."


def _count_shards(manifest: Manifest) -> str:
    count = manifest.hf.n_shards
    return "one file" if count == 1 else f"{count} shards"


def _gib(n_bytes: int) -> str:
    if n_bytes < 2**30:
        return f"{n_bytes / 2**20:.1f} MiB"
    return f"{n_bytes / 2**30:.2f} GiB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
