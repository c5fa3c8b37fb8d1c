"""What the tensors of a checkpoint mean: one file per architecture, one literal table."""

from reap2gguf.models.contract import (
    Expert,
    GgufTensor,
    HeaderValue,
    ModelFacts,
    MoeModel,
    Plain,
    Role,
    Router,
    Slab,
)
from reap2gguf.models.table import ARCHITECTURES, describe

__all__ = [
    "ARCHITECTURES",
    "Expert",
    "GgufTensor",
    "HeaderValue",
    "ModelFacts",
    "MoeModel",
    "Plain",
    "Role",
    "Router",
    "Slab",
    "describe",
]
