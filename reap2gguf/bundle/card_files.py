"""The GGUF files in a card: which there are, how to get one, and how to run it in each program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.bundle.card_choice import choice_section
from reap2gguf.bundle.card_quality import file_figures, file_headings, has_figures
from reap2gguf.bundle.layout import BITS_PICTURE, MODELFILE, gguf_name
from reap2gguf.bundle.markdown import argument, code, hub_link, inline, picture, prose, table
from reap2gguf.messages import one_line, size
from reap2gguf.quantizing.labels import LabelledFile, hub_note, tags_of

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, Manifest

_SAMPLING = "llama.cpp takes the sampling that the model's own"
DRAFTED = 2  # tokens that the MTP block drafts per step, in the commands


@dataclass(frozen=True)
class CardNames:
    """The names of both folders, or of both repositories on the Hub, as the cards print them."""

    hf: str
    gguf: str
    on_hub: bool = False

    def link(self, name: str) -> str:
        """A name as Markdown: a link if it is a repository on the Hub."""
        return hub_link(name) if self.on_hub else code(name)

    @property
    def repository(self) -> str:
        """The repository of the GGUF files, with OWNER in place of an owner that is not known."""
        return self.gguf if self.on_hub else f"OWNER/{self.gguf}"


def labelled_files(records: Sequence[GgufRecord]) -> list[LabelledFile]:
    """The files of a bundle as programs look for them by their labels."""
    return [LabelledFile(record.first, record.label, record.recipe) for record in records]


def join_command(record: GgufRecord) -> str:
    """The command that joins a file's parts."""
    return f"llama-gguf-split --merge {argument(record.first)} {argument(record.file)}"


def files_section(manifest: Manifest, names: CardNames) -> str:
    """The table of the files, with the tag that finds each on the Hub, and notes about them."""
    tags = tags_of(labelled_files(manifest.gguf))
    measured = has_figures(manifest)
    rows = []
    for record in manifest.gguf:
        tag = tags[record.first].llama_cpp
        shown = [code(record.first), _size(record), f"{record.bits_per_weight:.2f}"]
        shown += file_figures(manifest, record) if measured else ()
        rows.append((*shown, code(tag) if tag else "-", inline(record.title)))
    figures = file_headings(manifest) if measured else ()
    for side in manifest.side_files:
        empty = ("-",) * (len(figures) + 1)
        rows.append((code(side.file), size(side.n_bytes), "16", *empty, inline(side.title)))
    found = table(("file", "size", "bits per weight", *figures, "tag", "description"), rows)
    bits = [picture("Bits per weight by layer and role", BITS_PICTURE)]
    if BITS_PICTURE not in manifest.pictures:
        bits = []
    notes = [choice_section(manifest), *_parts(manifest.gguf)]
    parts = [found, *bits, *notes, _from_the_hub(manifest, names)]
    return "## Files\n\n" + "\n\n".join(part for part in parts if part)


def caveats(manifest: Manifest) -> Iterator[str]:
    """What to know of the files: what differs between programs, and what their labels mean."""
    for caveat in manifest.caveats:
        yield f"{prose(caveat)}."
    yield from _labels(manifest.gguf)


def _size(record: GgufRecord) -> str:
    parts = f" in {len(record.parts)} parts" if len(record.parts) > 1 else ""
    return size(record.n_bytes) + parts


def _from_the_hub(manifest: Manifest, names: CardNames) -> str:
    """How programs load a file from its repository by its tag, and how to download it."""
    tags = tags_of(labelled_files(manifest.gguf))
    first, repo = manifest.main_gguf, names.repository
    lines: list[str] = []
    for record in manifest.gguf:
        lines += [*([""] if lines else []), f"# {one_line(record.label)}, {size(record.n_bytes)}"]
        if names.on_hub:
            lines.append(f"hf download {argument(repo)} {_chosen(record, record is first)}")
        tag = tags[record.first]
        if record.is_ik:
            continue  # none of these programs loads it
        if tag.llama_cpp:
            lines.append(f"llama-server -hf {argument(f'{repo}:{tag.llama_cpp}')}")
        if not record.parts:
            lines.append(f"ollama run {argument(f'hf.co/{repo}:{tag.hub}')}")
        quant = f"@{record.label}" if tag.hub == record.label else ""  # else it asks which file
        lines.append(f"lms get {argument(f'https://huggingface.co/{repo}{quant}')}")
    if names.on_hub and manifest.side_files:
        lines += ["", "# projector for images"]
        lines += [f"hf download {argument(repo)} {_local(s.file)}" for s in manifest.side_files]
    commands = "\n".join(lines)
    where = "From the Hub" if names.on_hub else "After `reap2gguf push`, from the Hub"
    text = f"{where}, with llama.cpp, Ollama and LM Studio:\n\n```bash\n{commands}\n```"
    by_name = [r for r in manifest.gguf if tags[r.first].hub != tags[r.first].llama_cpp]
    if by_name:
        files = ", ".join(code(record.first) for record in by_name)
        text += f"\n\nFor Ollama, the tag is the whole file name of {files}."
    if names.on_hub:
        text += f"\n\nLM Studio finds the files under {code(repo)}."
    return text


def _chosen(record: GgufRecord, is_first: bool) -> str:
    """A file with all its parts, as `hf download` names it; the Modelfile is for the first file."""
    if not record.parts:
        return _local(record.file, *([MODELFILE] if is_first else []))
    patterns = [record.file.removesuffix(".gguf") + "-*.gguf", *([MODELFILE] if is_first else [])]
    return " ".join([*(f"--include {argument(pattern)}" for pattern in patterns), "--local-dir ."])


def _local(*files: str) -> str:
    return " ".join([*map(argument, files), "--local-dir ."])


def _labels(records: Sequence[GgufRecord]) -> Iterator[str]:
    """Explains labels that look like a quant type but are not one of llama.cpp's."""
    for record in records:
        if record.is_ik:
            yield (
                f"{code(record.file)} loads only in "
                "[ik_llama.cpp](https://github.com/ikawrakow/ik_llama.cpp): llama.cpp, Ollama and "
                "other programs do not know its tensor types."
            )
        elif record.label != record.file_type:
            seen = hub_note(record.label)
            recipe = "" if record.adopted else ", as its recipe says"
            yield (
                f"{code(record.label)} is llama.cpp's file type {inline(record.file_type)} with "
                f"some tensors in other types{recipe}; it is not a separate tensor type."
                + (f" {seen[0].upper()}{seen[1:]}." if seen else "")
            )


def _parts(records: Sequence[GgufRecord]) -> Iterator[str]:
    """How to use files in parts with programs that read single files only, such as Ollama."""
    record = next((record for record in records if record.parts), None)
    if record is not None:
        yield (
            "To load a file in parts, give llama.cpp the first part. For programs that cannot read "
            f"parts, such as Ollama, join them first: {_command(join_command(record))}."
        )


def _command(text: str) -> str:
    return f"`{text}`" if "`" not in text else code(text)


def recommends_sampling(card: str) -> bool:
    """Whether a GGUF card says that the model recommends a sampling."""
    return _SAMPLING in card


def use_section(manifest: Manifest, names: CardNames, samples: bool) -> str:
    """How to run the first file with each program, with its projector and its MTP block."""
    record = manifest.main_gguf
    model = argument(record.first)
    if record.is_ik:
        commands = f"llama-cli -m {model}\nllama-server -m {model}"
        return f"## Use it\n\nWith the programs of ik_llama.cpp:\n\n```bash\n{commands}\n```"
    projector = "".join(f" --mmproj {argument(side.file)}" for side in manifest.side_files)
    lines = [f"llama-cli -m {model}", f"llama-server -m {model}{projector}"]
    if manifest.pruning.mtp.drafts:
        draft = f"--spec-type draft-mtp --spec-draft-n-max {DRAFTED}"
        lines.append(f"llama-server -m {model}{projector} {draft}")
    lines.append("reap2gguf chat .")
    if record.parts:
        lines.append(join_command(record))
    ollama_name = gguf_name(names.hf.rpartition("/")[2]).removesuffix("-GGUF").lower()
    lines.append(f"ollama create {argument(ollama_name)} -f {MODELFILE}")
    commands = "\n".join(lines)
    return f"## Use it\n\n```bash\n{commands}\n```\n\n" + "\n\n".join(_uses(manifest, samples))


def _uses(manifest: Manifest, samples: bool) -> Iterator[str]:
    """What to know about projector, MTP block, sampling and other programs."""
    if manifest.side_files:
        yield "Images need the projector: `--mmproj`. With `-hf`, llama.cpp downloads it itself."
    has_mtp = manifest.pruning.mtp.drafts
    if has_mtp:
        yield (
            "The MTP block in the files can draft tokens (speculative decoding): with "
            "`--spec-type draft-mtp` in llama.cpp, and with "
            f"`PARAMETER draft_num_predict {DRAFTED}` in Ollama's Modelfile, where your version "
            "knows it."
        )
    sampling = ""
    if samples:
        yield (
            f"{_SAMPLING} `generation_config.json` recommends from the files, unless you pass "
            "another."
        )
        sampling = ", with the same sampling"
    also = " and the projector" if manifest.side_files else ""
    yield f"`{MODELFILE}` is for Ollama: it loads {code(manifest.main_gguf.file)}{also}{sampling}."
    if manifest.source.architecture.startswith("Qwen3_5"):
        block = " It does not load files with an MTP block." if has_mtp else ""
        yield (
            "ik_llama.cpp (ik-llama-cpp-python 0.1.5) computes something else for Qwen3.5 than "
            f"llama.cpp does.{block} Use llama.cpp."
        )
