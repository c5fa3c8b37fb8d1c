"""What the tensors of a checkpoint mean: one file per architecture, one literal table."""

from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import (
    Carried,
    Dropped,
    Expert,
    GgufTensor,
    HeaderValue,
    ModelFacts,
    Plain,
    Role,
    Router,
    SideFile,
    Slab,
)
from reap2gguf.models.table import ARCHITECTURES, describe

__all__ = [
    "ARCHITECTURES",
    "Carried",
    "Dropped",
    "Expert",
    "GgufTensor",
    "HeaderValue",
    "ModelFacts",
    "MoeModel",
    "Plain",
    "Role",
    "Router",
    "SideFile",
    "Slab",
    "describe",
]
