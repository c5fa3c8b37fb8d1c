"""The README.md of each folder: Hub front matter, this run's numbers, how to load the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.bundle.front_matter import new_front_matter
from reap2gguf.bundle.manifest import ComponentRecord, GgufRecord, Manifest, MtpRecord
from reap2gguf.bundle.modelfile import MODELFILE
from reap2gguf.messages import one_line

CARD_FILE = "README.md"

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


@dataclass(frozen=True)
class CardNames:
    """What the two folders are called where their cards are read."""

    hf: str
    gguf: str
    on_hub: bool = False

    def link(self, name: str) -> str:
        return f"[{name}](https://huggingface.co/{name})" if self.on_hub else f"`{name}`"


def local_names(manifest: Manifest) -> CardNames:
    """The names of the folders that a build leaves."""
    return CardNames(manifest.name, f"{manifest.name}-GGUF")


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

The weights are {_gib(folder.n_bytes)} in {_count_shards(manifest)}. GGUF files of the same model
are in {names.link(names.gguf)}.

{_method(manifest)}
"""


def gguf_card(manifest: Manifest, source_card: Path) -> str:
    """The card of the GGUF folder."""
    front = new_front_matter(manifest, source_card, "gguf")
    return front + gguf_body(manifest, local_names(manifest))


def gguf_body(manifest: Manifest, names: CardNames) -> str:
    """The card of the GGUF files, without its front matter."""
    rows = [_file_row(record) for record in manifest.gguf]
    rows += [f"| `{s.file}` | {_gib(s.n_bytes)} | 16 | {s.title} |" for s in manifest.side_files]
    files = "\n".join(rows)
    first = manifest.gguf[0].first
    name = _last(names.hf)
    notes = _honest_names(manifest.gguf) + _how_to_join(manifest.gguf)
    if names.on_hub:
        notes += f"The safetensors are in {names.link(names.hf)}.\n\n"
    return f"""# {name}-GGUF

{_summary(manifest)}

## Files

| file | size | bits per weight | what it is |
|---|---|---|---|
{files}

{notes}`imatrix.gguf` (and `imatrix.dat` for programs that read no other)
is the importance matrix of the pruned model, over {manifest.calibration.imatrix_chunks} chunks of
{manifest.calibration.imatrix_chunk_size} tokens of `calibration.txt`. `SHA256SUMS` holds the hash
of every file: `sha256sum -c SHA256SUMS`.

## Use it

```bash
{_download(manifest.gguf[0], names)}llama-cli -m {first}
llama-server -m {first}
reap2gguf chat .
{_join(manifest.gguf[0])}ollama create {name.lower()} -f Modelfile
```

`Modelfile` names `{manifest.gguf[0].file}` and holds the sampling that the model's own
`generation_config.json` recommends.

{_facts_table(manifest)}

{_method(manifest)}
"""


def _how_to_join(records: Sequence[GgufRecord]) -> str:
    """What to do with files in parts where a program reads one file only, as Ollama does."""
    record = next((record for record in records if record.parts), None)
    if record is None:
        return ""
    return (
        "llama.cpp opens a file in parts by its first. Programs that read one file only need them "
        f"joined: `{join_command(record)}`.\n\n"
    )


def join_command(record: GgufRecord) -> str:
    """What makes one file of a file's parts."""
    return f"llama-gguf-split --merge {record.first} {record.file}"


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _download(record: GgufRecord, names: CardNames) -> str:
    """The command that fetches a file of the Hub, with all its parts."""
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
    if len(record.parts) > 1:
        size += f" in {len(record.parts)} parts"
    return f"| `{record.first}` | {size} | {record.bits_per_weight:.2f} | {record.title} |"


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
