"""Makes the small files of a bundle again and compares them: cards, Modelfile, calibration text.

Cards and Modelfile are made from the manifest, and from files of the source. Where the source is
not given, its licence and language are taken from the card that is checked, and the sampling from
the safetensors folder's copy of `generation_config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import Keys

from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.layout import CARD_FILE, GGUF_SUFFIX, gguf_name
from reap2gguf.bundle.manifest import hash_file
from reap2gguf.bundle.sampling import read_sampling
from reap2gguf.errors import ArtifactError
from reap2gguf.files import is_own_file
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.messages import shown
from reap2gguf.tokenizer.identity import tokens_of_header
from reap2gguf.verifying.differences import compare_text, where_of

if TYPE_CHECKING:
    from reap2gguf.bundle.card_files import CardNames
    from reap2gguf.bundle.manifest import Manifest

_MAX_TEXT_BYTES = 2**20  # of a card or a Modelfile
_DOWNLOAD = re.compile(rf"^hf download ([\w.-]{{1,96}}/[\w.-]{{1,96}}{GGUF_SUFFIX}) ", re.MULTILINE)
_NOTHING = Path("/dev/null/none")  # a source without any file


@dataclass(frozen=True)
class Generated:
    """A generated file, the violations in it, and whether every byte of it was compared."""

    path: Path
    violations: tuple[str, ...]
    is_whole: bool


def check_cards(
    manifest: Manifest, hf: Path | None, gguf: Path | None, source: Path | None
) -> Iterator[Generated]:
    """Both cards against the manifest; `source` is the folder of the model that was pruned.

    A card that was published names its repositories: the owner is taken from the card itself.
    """
    # both cards inherit from one: without the source's, the one that is there stands for it
    inherited = next((place for place in (source, hf, gguf) if place is not None), _NOTHING)
    card = inherited / CARD_FILE
    if hf is not None and is_own_file(hf / CARD_FILE):
        yield _card(hf / CARD_FILE, _hf_cards(manifest, card), source is not None)
    if gguf is not None and is_own_file(gguf / CARD_FILE):
        yield _card(gguf / CARD_FILE, _gguf_cards(manifest, card, hf or source), source is not None)


def _card(path: Path, possible: Callable[[str], Iterator[str]], has_source: bool) -> Generated:
    """A card, which must be one of the `possible` ones; those depend on the owner it names."""
    text = _read(path)
    if text is None:
        return Generated(path, (f"{where_of(path)} is too large for a card",), False)
    violations: tuple[str, ...] = ()
    for expected in possible(text):
        violations = tuple(compare_text(path, text, expected))
        if not violations:
            break
    return Generated(path, violations, has_source)


def _hf_cards(manifest: Manifest, inherited: Path) -> Callable[[str], Iterator[str]]:
    # huggingface_hub, which reads front matter, takes a second to load
    from reap2gguf.bundle.card import hf_body, hf_card
    from reap2gguf.bundle.front_matter import front_matter

    def possible(text: str) -> Iterator[str]:
        local = hf_card(manifest, inherited)
        yield local
        if (names := _published_names(manifest, text)) is not None:
            yield front_matter(local) + hf_body(manifest, names)

    return possible


def _gguf_cards(
    manifest: Manifest, inherited: Path, config: Path | None
) -> Callable[[str], Iterator[str]]:
    """`config` holds the generation config, of which the card says whether there is one."""
    from reap2gguf.bundle.card import gguf_body, gguf_card
    from reap2gguf.bundle.front_matter import front_matter, published_front_matter

    known = None if config is None else read_sampling(config).is_recommended

    def possible(text: str) -> Iterator[str]:
        names = _published_names(manifest, text)
        for samples in (True, False) if known is None else (known,):
            local = gguf_card(manifest, inherited, samples)
            yield local
            if names is not None:
                front = published_front_matter(front_matter(local), manifest, names)
                yield front + gguf_body(manifest, names, samples)

    return possible


def _published_names(manifest: Manifest, card: str) -> CardNames | None:
    """The repositories that a published card names; the manifest has their names, not the owner."""
    from reap2gguf.bundle.card_files import CardNames

    if manifest.hf is None:  # only the commands for a download have the whole name
        found = _DOWNLOAD.search(card)
        if found is None:
            return None
        return CardNames(found[1].removesuffix(GGUF_SUFFIX), found[1], on_hub=True)
    name = manifest.hf.folder
    found = re.search(rf"(?<![\w./-])([\w.-]{{1,96}})/{re.escape(name)}(?![\w.-])", card)
    if found is None:
        return None
    repo = f"{found[1]}/{name}"
    return CardNames(repo, gguf_name(repo), on_hub=True)


def check_modelfile(manifest: Manifest, path: Path, source: Path | None) -> Generated:
    """The Modelfile against the manifest and the model's `generation_config.json` in `source`.

    If `source` is None, the parameters and comments are left out of the comparison.
    """
    from reap2gguf.bundle.modelfile import modelfile, with_join_commands

    text = _read(path)
    if text is None:
        return Generated(path, (f"{where_of(path)} is too large for a Modelfile",), False)
    expected = modelfile(manifest, _NOTHING if source is None else source)
    joined = with_join_commands(expected, manifest.gguf)
    if source is not None:
        return Generated(path, tuple(compare_text(path, text, joined)), True)
    found, wanted = ("\n".join(_instructions(one)) for one in (text, expected))
    return Generated(path, tuple(compare_text(path, found, wanted)), False)


def _instructions(text: str) -> Iterator[str]:
    """The lines of a Modelfile that are neither parameters nor comments."""
    for line in text.split("\n"):
        if line and not line.startswith(("#", "PARAMETER ")):
            yield line


def check_calibration_text(manifest: Manifest, path: Path) -> Iterator[str]:
    """The calibration text against the hash in the manifest."""
    expected = manifest.calibration.imatrix_sha256
    if hash_file(path).sha256 != expected:
        yield (
            f"{where_of(path)} is not the text of the importance matrix: its SHA-256 differs from "
            "imatrix_sha256 of the manifest"
        )


def check_observations(manifest: Manifest, path: Path) -> Iterator[str]:
    """The observations: of this source, and of the rows and experts that the manifest names."""
    pruning, where = manifest.pruning, where_of(path)
    try:
        seen = Observations.load(path)
    except ArtifactError as error:
        yield str(error)
        return
    if seen.model_fingerprint != manifest.source.fingerprint:
        if manifest.source.gguf is None or pruning.observations_file is None:
            yield f"{where} are of another checkpoint than the manifest's source"
        else:  # given ones may be of what the GGUF source was made from
            yield from _not_alike(seen, manifest, path)
    for name in ("n_rows", "n_tokens", "n_dropped_rows"):
        found, expected = getattr(seen, name), getattr(pruning, name)
        if found != expected:
            yield f"{where}: {name} is {found:,}, expected {expected:,} as in the manifest"
    for layer in sorted(pruning.kept):
        if layer not in seen.layers or len(seen.layers[layer].count) != pruning.n_experts:
            yield f"{where}: layer {layer} does not have {pruning.n_experts} experts"


def _not_alike(seen: Observations, manifest: Manifest, path: Path) -> Iterator[str]:
    """What tells that observations are not of the original of a GGUF source.

    Architecture and tokens are compared with the first GGUF file beside them, as far as both say.
    """
    file = next((path.with_name(record.first) for record in manifest.gguf), None)
    if file is None or not is_own_file(file):
        return  # that it is missing has been reported
    try:
        header = read_whole_header(file)
    except ArtifactError:
        return  # it has been reported with the file's own check
    expected = header.metadata.get(Keys.General.ARCHITECTURE)
    if seen.architecture and seen.architecture != expected:
        found = shown(seen.architecture)
        yield f"{where_of(path)} are of the architecture {found}, expected {shown(expected)}"
    tokens = tokens_of_header(header)
    if tokens and seen.tokens_sha256 not in ("", tokens):
        yield f"{where_of(path)} are of a model with other tokens than {file.name}"


def _read(path: Path) -> str | None:
    """The text of a small file; None if it is not small."""
    if path.stat().st_size > _MAX_TEXT_BYTES:
        return None
    return path.read_bytes().decode("utf-8", "replace")
