"""The front matter of a card: the YAML block at its top, which the Hub reads.

What the source's card says is inherited where it is true of the pruned model as well. The values
are the same whether they are made from the source's card or from the bundle's own, so that they can
be made again from a bundle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.markdown import repository
from reap2gguf.bundle.model_index import eval_results
from reap2gguf.bundle.source_card import SourceCard, read_card
from reap2gguf.pruning.methods import NO_METHOD, OBSERVED, merges

if TYPE_CHECKING:
    from reap2gguf.bundle.card_files import CardNames
    from reap2gguf.bundle.manifest import ComponentRecord, EarlierPruning, Manifest

_FRONT_MATTER = re.compile(r"---\n.*?\n---\n\n", re.DOTALL)
_GGUF_TAGS = ("gguf", "imatrix")
# tags that the Hub makes itself, and names of formats that a bundle does not have
_HUB_TAG = re.compile(r"(?:base_model|license|dataset|region|doi):.*|.*_compatible|safetensors")
_FORMAT_TAGS = re.compile(r"gguf|imatrix|mlx|gptq|awq|exl\d|fp8|nvfp4|mxfp4|int[48]", re.IGNORECASE)
_MOST_TAGS = 100
_FAMILY = re.compile(r"([A-Za-z0-9_]{1,64}?)For(?:CausalLM|ConditionalGeneration)")
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # where they begin
_WITH_IMAGES = ("image-text-to-text", "any-to-any", "visual-question-answering")


@dataclass(frozen=True)
class PrunedFrom:
    """What front matter and GGUF headers say of a pruned model, beside its source's card."""

    source: str  # owner/name, or the name of a folder
    architecture: str  # the class in config.json
    has_vision: bool = False  # the bundle has a vision projector
    datasets: tuple[str, ...] = ()  # on the Hub, of the calibration
    # what was done to the experts, here and to the source before; none: all of them are there
    methods: tuple[str, ...] = ("reap",)
    drops_experts: bool = True  # whether this program's last command did any of it
    is_repaired: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> PrunedFrom:
        """The same from a finished bundle's manifest."""
        return cls(
            manifest.source.label,
            manifest.source.architecture,
            bool(manifest.side_files),
            hub_datasets(manifest.calibration.components),
            methods_of(manifest.pruning.method, manifest.source.earlier),
            manifest.pruning.n_kept < manifest.pruning.n_experts,
            manifest.pruning.repair is not None,
        )

    @property
    def family(self) -> str | None:
        """The model type, such as `qwen3_moe`, from the name of the class."""
        match = _FAMILY.fullmatch(self.architecture)
        return None if match is None else _WORDS.sub("_", match[1]).lower()


def methods_of(method: str, earlier: EarlierPruning | None) -> tuple[str, ...]:
    """All that was done to the experts of a model, in order, where `method` came last."""
    before = () if earlier is None else tuple(earlier.methods)
    return before if method == NO_METHOD else (*before, method)


def hub_datasets(components: Sequence[ComponentRecord]) -> tuple[str, ...]:
    """The datasets on the Hub that a calibration used, each once."""
    names = (c.name for c in components if c.revision is not None and repository(c.name))
    return tuple(dict.fromkeys(names))


def pruned_values(card: SourceCard, pruned: PrunedFrom) -> dict[str, Any]:
    """The front matter of the safetensors; `card` is the source's, or the bundle's own."""
    values: dict[str, Any] = {}
    for key in ("license", "language"):
        if found := card.list(key):
            values[key] = found[0] if len(found) == 1 and key == "license" else found
    for key in ("license_name", "license_link"):
        if key in card.texts:
            values[key] = card.texts[key]
    if repository(pruned.source):
        values["base_model"] = pruned.source
        if pruned.drops_experts:  # else it is a copy, for which the Hub has no word
            values["base_model_relation"] = "finetune"  # nor has it one for pruning
    values["library_name"] = "transformers"
    values["pipeline_tag"] = _pipeline(card.texts.get("pipeline_tag"), pruned.has_vision)
    values["tags"] = _tags(card, pruned)
    if datasets := [*dict.fromkeys([*card.list("datasets"), *pruned.datasets])]:
        values["datasets"] = datasets
    return values


def _pipeline(inherited: str | None, has_vision: bool) -> str:
    if has_vision:
        return inherited if inherited in _WITH_IMAGES else _WITH_IMAGES[0]
    return "text-generation" if inherited is None or inherited in _WITH_IMAGES else inherited


def _tags(card: SourceCard, pruned: PrunedFrom) -> list[str]:
    own = [*_way_tags(pruned), pruned.family]
    inherited = (
        tag
        for tag in card.list("tags")
        if not _HUB_TAG.fullmatch(tag) and not _FORMAT_TAGS.fullmatch(tag)
    )
    return [*dict.fromkeys(tag for tag in (*own, *inherited) if tag)][:_MOST_TAGS]


def _way_tags(pruned: PrunedFrom) -> Iterator[str]:
    """What was done to the experts: by which methods, and whether they are fewer or merged."""
    methods = dict.fromkeys(pruned.methods)
    if any(method in OBSERVED for method in methods):
        yield "reap"
    yield from (method.replace("_", "-") for method in methods if merges(method))
    yield "moe"
    if not all(map(merges, methods)):
        yield from ("expert-pruning", "pruned")
    if any(map(merges, methods)):
        yield from ("expert-merging", "merged")
    if pruned.is_repaired:
        yield "repaired"


def new_front_matter(manifest: Manifest, source_card: Path, library: str) -> str:
    """Front matter for a new card in the folder of `library`: transformers or gguf."""
    values = pruned_values(read_card(source_card), PrunedFrom.of(manifest))
    if library == "gguf":
        values["library_name"] = library
        weighted = manifest.has_imatrix or manifest.source.gguf is None
        values["tags"] = [*values["tags"], *_GGUF_TAGS[: 1 + weighted]]
        if "base_model" in values:
            values["base_model_relation"] = "quantized"
    if results := eval_results(manifest, of_files=library == "gguf"):
        values |= {"model_name": manifest.name, "eval_results": results}
    return as_yaml(values)


def with_base_model(front: str, repo: str) -> str:
    """The front matter of a GGUF card that is published beside its safetensors, `repo`."""
    from huggingface_hub import ModelCard

    data = ModelCard(front).data
    data["base_model"], data["base_model_relation"] = repo, "quantized"
    data["quantized_by"] = repo.partition("/")[0]
    return _fenced(data)


def published_front_matter(front: str, manifest: Manifest, names: CardNames) -> str:
    """The front matter of a GGUF card as it is published.

    Its base model is the safetensors published beside it, or else the source, as it is.
    """
    if manifest.hf is not None:
        return with_base_model(front, names.hf)
    from huggingface_hub import ModelCard

    data = ModelCard(front).data
    data["quantized_by"] = names.gguf.partition("/")[0]
    return _fenced(data)


def as_yaml(values: dict[str, Any]) -> str:
    """Front matter as it stands at the top of a card."""
    from huggingface_hub import ModelCardData

    return _fenced(ModelCardData(**values))


def _fenced(data: Any) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n"


def front_matter(card: str) -> str:
    """The front matter of a card that this module wrote, with the empty line after it, or ""."""
    match = _FRONT_MATTER.match(card)
    return match[0] if match else ""
