"""Observations of the original, for a GGUF file that was made from it.

Fingerprints differ then. Observations say of which architecture they are and what its tokens are;
those of earlier versions do not, and are compared by layers and experts alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.errors import ArtifactError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.identity import tokens_of_header

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.gguf_source.checkpoint import GgufCheckpoint


def check_alike(seen: Observations, checkpoint: GgufCheckpoint, where: str) -> None:
    """Raises ArtifactError unless observations can be of the model that a GGUF file holds.

    Architecture, layers, experts and tokens must be the same, as far as they are recorded.
    """
    facts, path = checkpoint.decoded.model.facts, checkpoint.gguf.path
    advice = f"observe {path} itself, or the checkpoint that it was made from"
    if seen.architecture and seen.architecture != facts.gguf_arch:
        raise ArtifactError(
            f"{where}: the observations are of the architecture {shown(seen.architecture)}, and "
            f"{path} is of {facts.gguf_arch!r}; {advice}"
        )
    trunk = {layer for layer in facts.moe_layers if layer < facts.n_layers}
    observed = {layer for layer in seen.layers if layer < facts.n_layers}
    if observed != trunk or max(seen.layers, default=0) > facts.n_layers:
        raise ArtifactError(
            f"{where}: the observations are of the layers {shown(sorted(seen.layers))}, and {path} "
            f"has experts in {shown(sorted(facts.moe_layers))}; {advice}"
        )
    for layer, one in seen.layers.items():
        if len(one.count) != facts.n_experts:
            raise ArtifactError(
                f"{where}: layer {layer} of the observations has {len(one.count)} experts, and "
                f"{path} has {facts.n_experts}; {advice}"
            )
    expected = tokens_of_header(checkpoint.gguf)
    if expected and seen.tokens_sha256 not in ("", expected):
        raise ArtifactError(
            f"{where}: the observations are of a model with other tokens than {path}; {advice}"
        )
