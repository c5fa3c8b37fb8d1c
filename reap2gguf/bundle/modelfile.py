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

from reap2gguf.bundle.card_files import DRAFTED, join_command
from reap2gguf.bundle.layout import MODELFILE
from reap2gguf.bundle.markdown import argument
from reap2gguf.bundle.sampling import GENERATION_FILE, read_sampling
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.messages import is_visible, one_line
from reap2gguf.tokenizer.tokenizer_files import special_tokens

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, Manifest

# llama.cpp's names of a sampling's numbers, as Ollama calls them
_OLLAMA = {
    "temp": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "top_k": "top_k",
}
_MAX_STOPS = 16
_MAX_STOP_LETTERS = 100


def modelfile(manifest: Manifest, source: Path) -> str:
    """The text of a Modelfile for a bundle's first GGUF file, with its vision projector.

    `source` is the folder of the checkpoint that was pruned, or of the pruned one.
    """
    main = manifest.main_gguf
    name, others = (
        main.file,
        [one.file for one in manifest.gguf if one is not main and not one.is_ik],
    )
    lines = [
        f"# ollama create {argument(manifest.name.lower())} -f {MODELFILE}",
        *(f"FROM ./{one_line(file)}" for file in (name, *(s.file for s in manifest.side_files))),
        *(f"# FROM ./{one_line(other)}" for other in others),
        "",
        *_parameters(source),
    ]
    if manifest.pruning.mtp.drafts:
        lines += [
            "# The file has an MTP block. If your version of Ollama can draft tokens with it:",
            f"# PARAMETER draft_num_predict {DRAFTED}",
        ]
    lines += [
        "# Ollama recognizes the chat templates of common model families in the GGUF file. If",
        "# `ollama show --template` prints only {{ .Prompt }}, add a TEMPLATE in Go's syntax.",
    ]
    return "\n".join(lines) + "\n"


def with_join_commands(text: str, records: Sequence[GgufRecord]) -> str:
    """A Modelfile that begins with the commands that join files in parts: Ollama reads none."""
    commands = [f"# Ollama cannot read parts: {join_command(r)}\n" for r in records if r.parts]
    return "".join(command for command in commands if command not in text) + text


def _parameters(source: Path) -> Iterator[str]:
    path = source / GENERATION_FILE
    if not path.is_file():
        return
    try:
        values = read_json(path)
    except CheckpointError:
        yield "# generation_config.json of the source cannot be read; Ollama's defaults apply"
        return
    found = [*_sampling(source), *_stops(values, source)]
    if found:
        yield "# from the model's own generation_config.json"
        yield from found
        yield ""


def _sampling(source: Path) -> Iterator[str]:
    sampling = read_sampling(source)
    if not sampling.samples:
        return  # without sampling, the other values have no effect
    for key, name in _OLLAMA.items():
        if key in sampling.numbers:
            yield f"PARAMETER {name} {sampling.numbers[key]:g}"


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
        and is_visible(text)
        and '"' not in text
        and "\\" not in text
    )
