"""The card (README.md) of each folder: front matter, how to use the files, this build's numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.front_matter import new_front_matter
from reap2gguf.bundle.layout import (
    CALIBRATION_FILE,
    IMATRIX_DAT_FILE,
    IMATRIX_FILE,
    MANIFEST_FILE,
    MODELFILE,
    SUMS_FILE,
    gguf_name,
)
from reap2gguf.messages import one_line, parameters, size

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import ComponentRecord, GgufRecord, Manifest, MtpRecord

_PACKED = """\
Samples were packed: each row holds several samples, as in REAP's default. The last sample of a row
was cut off at the row's end, and a token may attend to the samples before its own."""

_REAP_CITATION = """\
@article{lasby-reap,
  title   = {{REAP} the Experts: Why Pruning Prevails for One-Shot {MoE} Compression},
  author  = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and Ioannou, Yani
             and Thangarasa, Vithursan},
  journal = {arXiv preprint arXiv:2510.13999},
  year    = {2025}
}"""


@dataclass(frozen=True)
class CardNames:
    """The names of both folders, or of both repositories on the Hub, as the cards print them."""

    hf: str
    gguf: str
    on_hub: bool = False

    def link(self, name: str) -> str:
        """A name as Markdown: a link if it is a repository on the Hub."""
        return f"[{name}](https://huggingface.co/{name})" if self.on_hub else f"`{name}`"


def local_names(manifest: Manifest) -> CardNames:
    """The names of the folders that a build makes."""
    return CardNames(manifest.name, gguf_name(manifest.name))


def hf_card(manifest: Manifest, source_card: Path) -> str:
    """The card of the safetensors folder."""
    front = new_front_matter(manifest, source_card, "transformers")
    return front + hf_body(manifest, local_names(manifest))


def hf_body(manifest: Manifest, names: CardNames) -> str:
    """The card of the safetensors, without its front matter."""
    folder, name = manifest.hf, names.hf
    return f"""# {_last(name)}

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

The weights take {size(folder.n_bytes)} in {_count_shards(manifest)}. GGUF files of the same model
are in {names.link(names.gguf)}.

{_method(manifest)}
"""


def gguf_card(manifest: Manifest, source_card: Path) -> str:
    """The card of the GGUF folder."""
    front = new_front_matter(manifest, source_card, "gguf")
    return front + gguf_body(manifest, local_names(manifest))


def gguf_body(manifest: Manifest, names: CardNames) -> str:
    """The card of the GGUF files, without its front matter."""
    calibration = manifest.calibration
    rows = [_file_row(record) for record in manifest.gguf]
    rows += [f"| `{s.file}` | {size(s.n_bytes)} | 16 | {s.title} |" for s in manifest.side_files]
    files = "\n".join(rows)
    first = manifest.gguf[0].first
    name = _last(names.hf)
    notes = _custom_labels(manifest.gguf) + _how_to_join(manifest.gguf)
    if names.on_hub:
        notes += f"The safetensors are in {names.link(names.hf)}.\n\n"
    notes += "".join(f"Note: {_prose(caveat)}.\n\n" for caveat in manifest.caveats)
    return f"""# {gguf_name(name)}

{_summary(manifest)}

## Files

| file | size | bits per weight | description |
|---|---|---|---|
{files}

{notes}`{IMATRIX_FILE}` is the importance matrix of the pruned model, computed on
{calibration.imatrix_chunks:,} chunks of {calibration.imatrix_chunk_size:,} tokens from
`{CALIBRATION_FILE}`; `{IMATRIX_DAT_FILE}` is the same in the older format that ik_llama.cpp reads.
To check the files after a download: `sha256sum -c {SUMS_FILE}`.

## Use it

```bash
{_download(manifest.gguf[0], names)}llama-cli -m {first}
llama-server -m {first}
reap2gguf chat .
{_join(manifest.gguf[0])}ollama create {name.lower()} -f {MODELFILE}
```

`{MODELFILE}` is for Ollama: it loads `{manifest.gguf[0].file}` with the sampling parameters of the
model's own `generation_config.json`.

{_facts_table(manifest)}

{_method(manifest)}
"""


def _how_to_join(records: Sequence[GgufRecord]) -> str:
    """How to use files in parts with programs that read single files only, such as Ollama."""
    record = next((record for record in records if record.parts), None)
    if record is None:
        return ""
    return (
        "To load a file in parts, give llama.cpp the first part. For programs that cannot read "
        f"parts, such as Ollama, join them first: `{join_command(record)}`.\n\n"
    )


def join_command(record: GgufRecord) -> str:
    """The command that joins a file's parts."""
    return f"llama-gguf-split --merge {record.first} {record.file}"


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _download(record: GgufRecord, names: CardNames) -> str:
    """The command that downloads a file with all its parts from the Hub."""
    if not names.on_hub:
        return ""
    if not record.parts:
        return f"hf download {names.gguf} {record.file} {MODELFILE} --local-dir .\n"
    parts = f"{record.file.removesuffix('.gguf')}-*.gguf"
    return f'hf download {names.gguf} --include "{parts}" --include {MODELFILE} --local-dir .\n'


def _join(record: GgufRecord) -> str:
    return f"{join_command(record)}\n" if record.parts else ""


def _summary(manifest: Manifest) -> str:
    pruning, source = manifest.pruning, manifest.source
    share = 1 - pruning.n_kept / pruning.n_experts
    method = "REAP" if pruning.method == "reap" else pruning.method
    return (
        f"{_source_link(manifest)} with {share:.0%} of its experts pruned by {method}: each MoE "
        f"layer keeps {pruning.n_kept} of {pruning.n_experts} experts, "
        f"{pruning.experts_per_token} active per token. {parameters(manifest.hf.n_parameters)} of "
        f"{parameters(source.n_parameters)} parameters remain."
    )


def _source_link(manifest: Manifest) -> str:
    label = manifest.source.label
    return f"[{label}](https://huggingface.co/{label})" if "/" in label else f"`{label}`"


def _facts_table(manifest: Manifest) -> str:
    pruning, calibration = manifest.pruning, manifest.calibration
    packed = ", samples packed" if calibration.packed else ""
    text = (
        f"{calibration.spec}: {pruning.n_rows:,} rows of at most {calibration.max_length:,} "
        f"tokens{packed}, {pruning.n_tokens:,} tokens in total, seed {calibration.seed}"
    )
    rows = [
        ("source", manifest.source.label + _at(manifest.source.revision)),
        ("architecture", manifest.source.architecture),
        ("experts per layer", f"{pruning.n_kept} of {pruning.n_experts}"),
        ("active experts per token", str(pruning.experts_per_token)),
        ("parameters", f"{manifest.hf.n_parameters:,}"),
        ("pruning method", pruning.method),
        ("calibration", text),
        ("checks", str(manifest.verification.get("summary", "not run"))),
    ]
    if pruning.mtp.state != "none":
        rows.insert(-1, ("multi-token prediction (MTP)", _mtp(pruning.mtp)))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _mtp(mtp: MtpRecord) -> str:
    if not mtp.n_tokens:
        return mtp.state
    before, after = mtp.hits_before / mtp.n_tokens, mtp.hits_after / mtp.n_tokens
    return (
        f"{mtp.state} like the other layers; top-1 accuracy {before:.1%} before pruning, "
        f"{after:.1%} after"
    )


def _at(revision: str | None) -> str:
    return f" at {revision[:12]}" if revision else ""


def _file_row(record: GgufRecord) -> str:
    takes = size(record.n_bytes)
    if len(record.parts) > 1:
        takes += f" in {len(record.parts)} parts"
    return f"| `{record.first}` | {takes} | {record.bits_per_weight:.2f} | {record.title} |"


def _custom_labels(records: Sequence[GgufRecord]) -> str:
    """Explains labels that look like a quant type but are not one of llama.cpp's."""
    lines = [
        f"`{record.label}` is llama.cpp's file type {record.file_type} with some tensors in other "
        "types, as its recipe says; it is not a separate tensor type."
        for record in records
        if record.label != record.file_type
    ]
    return " ".join(lines) + "\n\n" if lines else ""


def _prose(text: str) -> str:
    """Text of a manifest in which no letter means anything to Markdown or HTML."""
    return re.sub(r"[<>&\\`*_\[\]|]", lambda found: f"&#{ord(found[0])};", one_line(text))


def _method(manifest: Manifest) -> str:
    pruning = manifest.pruning
    skipped = ""
    if pruning.n_dropped_rows:
        skipped = f" ({pruning.n_dropped_rows:,} rows with NaN or infinite values were skipped)"
    return f"""## How it was made

A calibration pass ran the source model on {pruning.n_tokens:,} tokens{skipped}.
{_score(pruning.method)} The experts with the lowest scores were removed from each layer. The pruned
safetensors keep all other weights of the source byte for byte: nothing was retrained. The
importance matrix was computed on the pruned model. Calibration used text only. `{MANIFEST_FILE}`
records versions, hashes, the experts kept in each layer, and the type of each tensor.

{_calibration(manifest)}

Made with reap2gguf {manifest.program.get("reap2gguf", "")}.

```bibtex
{_REAP_CITATION}
```"""


def _calibration(manifest: Manifest) -> str:
    """How much of each dataset and file was used."""
    lines = [
        f"| {_component(record)} | {record.rows:,} | {record.tokens:,} | {_samples(record)} |"
        for record in manifest.calibration.components
    ]
    if not lines:
        return "The calibration data is not listed."
    table = "\n".join(
        ["| calibration data | rows | tokens | samples |", "|---|---|---|---|", *lines]
    )
    has_samples = any(record.samples for record in manifest.calibration.components)
    return f"{table}\n\n{_PACKED}" if manifest.calibration.packed and has_samples else table


def _samples(record: ComponentRecord) -> str:
    return f"{record.samples:,}" if record.samples else "cut from text"


def _component(record: ComponentRecord) -> str:
    """A dataset with its link and commit, or the name of a file, for a table cell."""
    title = one_line(record.title).replace("|", "\\|")
    if record.revision is None:
        return f"`{title}`"
    commit = one_line(record.revision)[:12]
    return f"[{title}](https://huggingface.co/datasets/{record.name}) at {commit}"


def _score(method: str) -> str:
    if method == "reap":
        return (
            "An expert's score is the mean of its gate weight times the norm of its output, over "
            "all tokens routed to it ([REAP](https://arxiv.org/abs/2510.13999))."
        )
    return f"Experts were ranked by `{method}`, one of the methods that REAP was compared with."


def _count_shards(manifest: Manifest) -> str:
    count = manifest.hf.n_shards
    return "one file" if count == 1 else f"{count} shards"
