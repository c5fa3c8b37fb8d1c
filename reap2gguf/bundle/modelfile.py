"""The `Modelfile` of a bundle, which `ollama create` reads.

It translates what the checkpoint says into Ollama's parameters (docs.ollama.com/modelfile): the
sampling that `generation_config.json` recommends, and the tokens that end an answer.

It has no TEMPLATE. Ollama's templates are written in Go's syntax, a checkpoint's in Jinja, and a
translation with small mistakes would give worse answers without anyone noticing. Ollama uses one of
its own templates if the GGUF's template is nearly identical to a known one; otherwise it sends the
raw prompt, and the user has to add a TEMPLATE. A comment in the file says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.card import join_command
from reap2gguf.bundle.layout import MODELFILE
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.tokenizer.tokenizer_files import special_tokens

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, Manifest

# name in generation_config.json -> Ollama's name, smallest and largest sensible value
_NUMBERS = {
    "temperature": ("temperature", 0.0, 10.0),
    "top_p": ("top_p", 0.0, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "repetition_penalty": ("repeat_penalty", 0.01, 10.0),
}
_MAX_TOP_K = 10_000
_MAX_STOPS = 16
_MAX_STOP_LETTERS = 100


def modelfile(manifest: Manifest, source: Path) -> str:
    """The text of a Modelfile for a bundle's first GGUF file.

    `source` is the folder of the checkpoint that was pruned.
    """
    name, others = manifest.gguf[0].file, [record.file for record in manifest.gguf[1:]]
    lines = [
        f"# ollama create {manifest.name.lower()} -f {MODELFILE}",
        f"FROM ./{name}",
        *(f"# FROM ./{other}" for other in others),
        "",
        *_parameters(source),
        "# Ollama recognizes the chat templates of common model families in the GGUF file. If",
        "# `ollama show --template` prints only {{ .Prompt }}, add a TEMPLATE in Go's syntax.",
    ]
    return "\n".join(lines) + "\n"


def with_join_commands(text: str, records: Sequence[GgufRecord]) -> str:
    """A Modelfile that begins with the commands that join files in parts: Ollama reads none."""
    commands = [f"# Ollama cannot read parts: {join_command(r)}\n" for r in records if r.parts]
    return "".join(command for command in commands if command not in text) + text


def _parameters(source: Path) -> Iterator[str]:
    path = source / "generation_config.json"
    if not path.is_file():
        return
    try:
        values = read_json(path)
    except CheckpointError:
        yield "# generation_config.json of the source cannot be read; Ollama's defaults apply"
        return
    found = [*_sampling(values), *_stops(values, source)]
    if found:
        yield "# from the model's own generation_config.json"
        yield from found
        yield ""


def _sampling(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("do_sample") is False:
        return  # without sampling, the other values have no effect
    for key, (name, low, high) in _NUMBERS.items():
        value: Any = values.get(key)
        if type(value) in (int, float) and low <= value <= high:  # false for NaN
            yield f"PARAMETER {name} {value:g}"
    top_k = values.get("top_k")
    if type(top_k) is int and 0 <= top_k <= _MAX_TOP_K:
        yield f"PARAMETER top_k {top_k}"


def _stops(values: Mapping[str, Any], source: Path) -> Iterator[str]:
    """The tokens that end an answer; only special ones, as ordinary text must not end it."""
    ids = values.get("eos_token_id")
    wanted = ids if isinstance(ids, list) else [ids]
    try:
        special = special_tokens(source)
    except CheckpointError:
        return  # the export has refused it already
    for token in dict.fromkeys(special.get(i, "") for i in wanted[:_MAX_STOPS] if type(i) is int):
        if _fits_a_line(token):
            yield f'PARAMETER stop "{token}"'


def _fits_a_line(text: str) -> bool:
    """Whether a line of a Modelfile can hold the text."""
    return (
        0 < len(text) <= _MAX_STOP_LETTERS
        and text.isprintable()
        and '"' not in text
        and "\\" not in text
    )
