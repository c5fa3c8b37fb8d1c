"""Header values at which llama.cpp ends its process without an error that can be caught.

The conditions are those of its assertions: `load_hparams` in src/llama-model.cpp, the graphs in
src/models, and the operators in ggml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.tensor_types import is_ik
from reap2gguf.messages import shown
from reap2gguf.models.description import is_of_experts

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader

_CONTEXT_STEP = 256
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS
_SCALINGS = ("none", "linear", "yarn", "longrope")
# these rotate whole heads; Qwen3.5's and others rotate a part
_WHOLE_HEADS = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe")
_DELTANET = ("qwen35", "qwen35moe", "qwen3next")


def ik_types(header: GgufHeader) -> list[str]:
    """Names of the types of ik_llama.cpp alone that a file's tensors have."""
    kinds = {info.tensor_type for info in header.tensors.values() if is_ik(info.tensor_type)}
    return sorted(kind.name for kind in kinds)


def check_header(path: Path, header: GgufHeader) -> None:
    """Refuse types that llama.cpp does not have, and values at which it aborts the whole process.

    Raises ArtifactError.
    """
    if types := ik_types(header):
        raise ArtifactError(
            f"{path}: has tensors of {', '.join(types)}, which only ik_llama.cpp loads; pass "
            "another file, such as a Q4_K_M, or run this one with the programs of ik_llama.cpp"
        )
    arch = header.metadata.get("general.architecture")
    if isinstance(arch, str):  # else llama.cpp reports it
        checks = _Checks(path, header, arch)
        checks.counts()
        checks.experts()
        checks.attention()
        checks.recurrence()
        checks.vocabulary()


@dataclass(frozen=True)
class _Checks:
    """The checks of one file; each raises ArtifactError."""

    path: Path
    header: GgufHeader
    arch: str

    def _value(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.arch}.{key}", default)

    def _refuse(self, key: str, expected: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: {self.arch}.{key} is {shown(self._value(key))}, expected {expected}; "
            "llama.cpp would abort"
        )

    def _bounded(self, key: str, least: int, most: int) -> int:
        """The highest value of a count, or of a list of counts per layer; 0 where it is absent."""
        value = self._value(key)
        if value is None:
            return 0
        highest = max(value, default=0) if isinstance(value, Sequence) else value
        if type(highest) is not int or not least <= highest <= most:
            raise self._refuse(key, f"{least:,} to {most:,}")
        return highest

    def counts(self) -> None:
        """Layers and the values of floating point."""
        n_layers = self._bounded("block_count", 1, _MAX_LAYERS)
        self._bounded("nextn_predict_layers", 0, n_layers)
        for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
            value = self._value(key, 0.0)
            if not isinstance(value, float) or not 0 <= value < math.inf:
                raise self._refuse(key, "a number from 0")
        if self._value("rope.scaling.type", "none") not in _SCALINGS:
            raise self._refuse("rope.scaling.type", f"one of {', '.join(_SCALINGS)}")

    def experts(self) -> None:
        """Experts, how many of them are used, and their groups."""
        n_experts = self._bounded("expert_count", 0, _MAX_EXPERTS)
        self._bounded("expert_used_count", 0, n_experts)
        if n_experts and not self._bounded("expert_used_count", 0, n_experts):
            raise ArtifactError(
                f"{self.path}: {self.arch}.expert_used_count is 0, expected 1 to {n_experts}"
            )
        n_groups = self._bounded("expert_group_count", 0, max(n_experts - 1, 0))
        if n_groups > 1:
            if n_experts % n_groups:
                raise self._refuse("expert_group_count", f"a divisor of {n_experts}")
            if not self._bounded("expert_group_used_count", 1, n_groups - 1):
                raise self._refuse("expert_group_used_count", f"1 to {n_groups - 1}")
        for name in self.header.tensors:
            if is_of_experts(name) and not n_experts:
                raise ArtifactError(
                    f"{self.path}: {shown(name)} holds experts, but {self.arch}.expert_count is 0"
                )

    def attention(self) -> None:
        """Heads, and how much of each is rotated."""
        length = self._value("attention.key_length")
        if length is None:
            width, n_heads = self._value("embedding_length"), self._value("attention.head_count")
            if type(width) is not int or type(n_heads) is not int or n_heads < 1:
                return  # llama.cpp reports it
            length = width // n_heads
        rotated = self._value("rope.dimension_count")
        if rotated is None:
            return
        is_right: Callable[[int], bool] = lambda count: count == length  # noqa: E731
        expected = f"{length}, as many as a head has"
        if self.arch not in _WHOLE_HEADS:
            least = 2 if self.arch in _DELTANET else 0  # at 0 its rotation never ends
            is_right = lambda count: least <= count <= length and count % 2 == 0  # noqa: E731
            expected = f"an even number from {least} to {length}"
        if type(rotated) is not int or type(length) is not int or not is_right(rotated):
            raise self._refuse("rope.dimension_count", expected)

    def recurrence(self) -> None:
        """The linear attention of Qwen3-Next and Qwen3.5, and the sections of its rotation."""
        heads, width = self._value("ssm.time_step_rank"), self._value("ssm.state_size")
        is_deltanet = self.arch in _DELTANET and type(heads) is type(width) is int
        if is_deltanet and self._value("ssm.inner_size") != heads * width:
            raise self._refuse("ssm.inner_size", f"{heads * width}, time_step_rank x state_size")
        sections = self._value("rope.dimension_sections")
        length = self._value("attention.key_length")
        if isinstance(sections, list) and type(length) is int:
            is_right = all(type(one) is int and one >= 0 for one in sections)
            if not is_right or not 1 <= sum(sections[:3]) <= sum(sections) <= length:
                raise self._refuse("rope.dimension_sections", f"a sum of 1 to {length}")

    def vocabulary(self) -> None:
        """Lists with an entry per token, and ids of tokens."""
        tokens = self.header.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            return
        for name in ("token_type", "scores"):
            values = self.header.metadata.get(f"tokenizer.ggml.{name}")
            if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
                raise ArtifactError(
                    f"{self.path}: tokenizer.ggml.{name} does not have one entry for each of "
                    f"{len(tokens):,} tokens; llama.cpp would read beyond it"
                )


def usable_context(header: GgufHeader, wanted: int) -> int:
    """The wanted context in tokens, limited to the model's own and rounded up to llama.cpp's step.

    llama.cpp rounds up by itself; llama-cpp-python then fills arrays of the number before.
    """
    metadata = header.metadata
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    most = min(wanted, trained) if isinstance(trained, int) and trained > 0 else wanted
    return -(-most // _CONTEXT_STEP) * _CONTEXT_STEP
