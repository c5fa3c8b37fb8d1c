"""How to run the files, in each program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MODELFILE, SUMS_FILE, gguf_name
from reap2gguf.bundle.markdown import argument, quoted
from reap2gguf.models.loading import classes_for_all
from reap2gguf.quantizing.labels import LabelledFile, tags_of
from reap2gguf.reporting.html import Html, commands, element, paragraph, section

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.reporting.facts import ReportFacts

_DRAFTED = 2  # tokens that the MTP block drafts per step


def running(facts: ReportFacts) -> Html:
    """The section of programs."""
    manifest = facts.manifest
    return section(
        "run",
        "How to run it",
        paragraph("In the folder of the GGUF files; for another file, put its name in its place."),
        _program("llama.cpp", *_llama_cpp(manifest)),
        _program(
            "Ollama",
            f"ollama create {argument(manifest.name.lower())} -f {MODELFILE}",
            f"ollama run {argument(manifest.name.lower())}",
        ),
        _hub(manifest),
        *_safetensors(manifest),
        _program("Check the files after a download", f"sha256sum -c {SUMS_FILE}"),
    )


def _program(name: str, *lines: str) -> Html:
    return element("div", element("h3", name), commands(*lines), class_="program")


def _llama_cpp(manifest: Manifest) -> list[str]:
    record = manifest.main_gguf
    model = argument(record.first)
    projector = "".join(f" --mmproj {argument(side.file)}" for side in manifest.side_files)
    found = [f"llama-cli -m {model}", f"llama-server -m {model}{projector}"]
    if manifest.pruning.mtp.drafts:
        draft = f"--spec-type draft-mtp --spec-draft-n-max {_DRAFTED}"
        found.append(f"llama-server -m {model}{projector} {draft}")
    return found


def _hub(manifest: Manifest) -> Html:
    """Lines for each file once it is on the Hub, where its owner has a name."""
    files = [LabelledFile(one.first, one.label, one.recipe) for one in manifest.gguf]
    tags, repo = tags_of(files), f"OWNER/{gguf_name(manifest.name)}"
    found = []
    for record in manifest.gguf:
        tag = tags[record.first]
        if tag.llama_cpp:
            found.append(f"llama-server -hf {argument(f'{repo}:{tag.llama_cpp}')}")
        if not record.parts:
            found.append(f"ollama run {argument(f'hf.co/{repo}:{tag.hub}')}")
    title = "From the Hub, after reap2gguf push"
    note = paragraph("LM Studio finds the files under the name of the repository.")
    return element("div", element("h3", title), commands(*found), note, class_="program")


def _safetensors(manifest: Manifest) -> list[Html]:
    if manifest.hf is None:
        why = "The safetensors are those of the source: nothing was pruned."
        if manifest.source.gguf is not None:
            why = "There are none: the source is a GGUF file, and its experts were cut there."
        return [paragraph(why)]
    name = manifest.name
    model, reader = classes_for_all(manifest.source.architecture, bool(manifest.side_files))
    return [
        _program(
            "transformers",
            f"from transformers import {model}, {reader}",
            "",
            f"{_variable(reader)} = {reader}.from_pretrained({quoted(name)})",
            f'model = {model}.from_pretrained({quoted(name)}, dtype="auto", device_map="auto")',
        ),
        _program("vLLM", f"vllm serve {argument(name)}"),
    ]


def _variable(name: str) -> str:
    return name.removeprefix("Auto").lower()
