"""Qwen3.5-MoE (Qwen3.5-35B-A3B): DeltaNet, a shared expert, a vision tower and an MTP block.

The Hub's layout nests the text model's config and names (`text_config`, `model.language_model.*`)
and fuses the experts (3D) but for the MTP block's (2D); re-saved checkpoints are flat, or 2D
throughout, or have lost the MTP block. All of them are read; what is written keeps the source's
layout. GGUF names, types and keys are those of llama.cpp's `qwen35moe`, where the MTP block is the
last layer and carries `nextn.*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import UnknownTensorError, UnsupportedModelError
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
)
from reap2gguf.models.limits import MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH
from reap2gguf.models.qwen3_5_config import (
    MTP_KEY,
    read_deltanet,
    read_layer_kinds,
    refuse_what_is_not_implemented,
)
from reap2gguf.models.qwen3_5_header import text_header
from reap2gguf.models.qwen3_5_layout import (
    ALWAYS_F32,
    ATTENTION,
    COMMON,
    DELTANET,
    MTP,
    OUTER,
    ROUTER,
    SHARED_INPUTS,
    layer_shapes,
    transform_of,
)
from reap2gguf.models.qwen_vision import vision_projector
from reap2gguf.models.tensors import single

_INDEX = r"(0|[1-9][0-9]{0,5})"
_EXPERT_2D = re.compile(rf"mlp\.experts\.{_INDEX}\.(gate|up|down)_proj\.weight")
_EXPERT_3D = re.compile(r"mlp\.experts\.(gate_up|down)_proj(?:\.weight)?")
_COUNT_KEYS = ("num_experts", "num_local_experts")
_VISION = ("model.visual.", "visual.")


class Qwen35Moe(MoeModel):
    """One Qwen3.5-MoE model."""

    model_type: ClassVar[str] = "qwen3_5_moe"

    def read_facts(self) -> ModelFacts:
        self.text: Mapping[str, Any] = self.reader.section("text_config") or self.config
        read = self.text_reader = ConfigReader(self.text, self.reader.where)
        # found once: every name is asked for its role by these
        deep = any(name.startswith("model.language_model.") for name in self.names)
        self._text_prefix = "model.language_model." if deep else "model."
        deep = any(name.startswith("model.mtp.") for name in self.names)
        self._mtp_prefix = "model.mtp." if deep else "mtp."
        refuse_what_is_not_implemented(self.reader, read)
        n_layers = read.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
        self.layer_kinds = read_layer_kinds(read, n_layers)
        self.deltanet = read_deltanet(read)
        hidden = read.integer("hidden_size", low=1, high=MAX_WIDTH)
        n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS)
        n_experts = read.integer(*_COUNT_KEYS, low=2, high=MAX_EXPERTS)
        has_mtp = self.keep_mtp and any(self._in_mtp(name) for name in self.names)
        if has_mtp and "full_attention" not in self.layer_kinds:
            raise UnsupportedModelError(
                f"{read.where}: no layer is full_attention, which the MTP block's layer is"
            )
        return ModelFacts(
            architecture=str(self.config["architectures"][0]),
            gguf_arch="qwen35moe",
            n_layers=n_layers,
            moe_layers=tuple(range(n_layers + has_mtp)),
            hidden_size=hidden,
            expert_width=read.integer("moe_intermediate_size", low=1, high=MAX_WIDTH),
            n_experts=n_experts,
            experts_per_token=read.integer("num_experts_per_tok", low=1, high=n_experts),
            n_heads=n_heads,
            n_kv_heads=read.integer("num_key_value_heads", low=1, high=MAX_HEADS, default=n_heads),
            head_dim=read.integer("head_dim", low=1, high=MAX_WIDTH, default=hidden // n_heads),
            vocab_size=read.integer("vocab_size", low=1, high=MAX_VOCABULARY),
            context_length=read.integer("max_position_embeddings", low=1),
            tied_embeddings=self._reads_tied(),
            has_mtp=has_mtp,
        )

    def _reads_tied(self) -> bool:
        outer = self.reader.boolean("tie_word_embeddings", default=False)
        inner = self.text_reader.boolean("tie_word_embeddings", default=outer)
        return outer if "tie_word_embeddings" in self.config else inner

    @property
    def text_prefix(self) -> str:
        return self._text_prefix

    def _in_mtp(self, name: str) -> bool:
        return name.startswith(("mtp.", "model.mtp."))

    def layer_prefix(self, layer: int) -> str:
        if layer == self.facts.mtp_layer:
            return f"{self._mtp_prefix}layers.0."
        return f"{self.text_prefix}layers.{layer}."

    def block_prefix(self, layer: int) -> str:
        return self._mtp_prefix if layer == self.facts.mtp_layer else self.layer_prefix(layer)

    def experts_path(self, layer: int) -> str:
        return f"{'layers.0.' if layer == self.facts.mtp_layer else ''}mlp.experts"

    def mtp_template(self) -> int:
        return self.layer_kinds.index("full_attention")

    def _names_in(self, layer: int) -> Mapping[str, str]:
        """HF name -> GGUF name of everything but experts in one layer, without prefixes."""
        linear = layer < self.facts.n_layers and self.layer_kinds[layer] == "linear_attention"
        return COMMON | (DELTANET if linear else ATTENTION)

    def role(self, name: str) -> Role:
        if name.startswith(_VISION):
            return Carried()
        if self._in_mtp(name) and not self.keep_mtp:
            return Dropped()
        if name == "lm_head.weight":
            return Carried() if self.facts.tied_embeddings else Plain(None)
        if name.removeprefix(self.text_prefix) in OUTER and name.startswith(self.text_prefix):
            return Plain(None)
        if name.startswith(self._mtp_prefix) and name.removeprefix(self._mtp_prefix) in MTP:
            return Plain(self.facts.mtp_layer)
        role = self._role_in_layer(name)
        if role is None:
            raise UnknownTensorError(
                f"tensor {name!r} has no meaning in {self.facts.architecture} with "
                f"{self.facts.n_layers} layers; nothing is skipped silently, so it must be removed "
                "or taught to models/qwen3_5_moe.py"
            )
        return role

    def _role_in_layer(self, name: str) -> Role | None:
        found = re.fullmatch(rf"(.*\.|)layers\.{_INDEX}\.(.+)", name)
        if found is None:
            return None
        layer = self.facts.mtp_layer if self._in_mtp(name) else int(found[2])
        if layer is None or layer >= self.facts.n_blocks:
            return None
        if not name.startswith(self.layer_prefix(layer)):
            return None
        rest = name.removeprefix(self.layer_prefix(layer))
        if rest == ROUTER:
            return Router(layer)
        if rest in self._names_in(layer):
            return Plain(layer)
        if expert := _EXPERT_2D.fullmatch(rest):
            return Expert(layer, expert[2], int(expert[1]))  # type: ignore[arg-type]
        if fused := _EXPERT_3D.fullmatch(rest):
            return Expert(layer, fused[1], None)  # type: ignore[arg-type]
        return None

    def gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> tuple[GgufTensor, ...]:
        return tuple(self._gguf_tensors(stored))

    def _gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[GgufTensor]:
        if not self.facts.tied_embeddings:
            yield single(stored, "lm_head.weight", "output.weight")
        for name, gguf_name in OUTER.items():
            yield self._single(stored, self.text_prefix, name, gguf_name)
        for layer in range(self.facts.n_blocks):
            blk = f"blk.{layer}."
            for name, gguf_name in self._names_in(layer).items():
                yield self._single(stored, self.layer_prefix(layer), name, blk + gguf_name)
            yield from self.expert_tensors(layer, stored).values()
        if self.facts.has_mtp:
            for name, gguf_name in MTP.items():
                blk = f"blk.{self.facts.mtp_layer}."
                yield self._single(stored, self._mtp_prefix, name, blk + gguf_name)

    def _single(
        self, stored: Mapping[str, StoredTensor], prefix: str, name: str, gguf_name: str
    ) -> GgufTensor:
        shape = None
        if name == "linear_attn.conv1d.weight" and prefix + name in stored:
            channels, _, kernel = stored[prefix + name].shape
            shape = (channels, kernel)
        pinned = name in ALWAYS_F32 or "norm" in name
        return single(
            stored, prefix + name, gguf_name, pinned, transform_of(name, self.deltanet), shape
        )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        facts = self.facts
        found = {
            self.embedding_name: (facts.vocab_size, facts.hidden_size),
            "lm_head.weight": (facts.vocab_size, facts.hidden_size),
            self.norm_name: (facts.hidden_size,),
            f"{self._mtp_prefix}fc.weight": (facts.hidden_size, 2 * facts.hidden_size),
            f"{self._mtp_prefix}norm.weight": (facts.hidden_size,),
            f"{self._mtp_prefix}pre_fc_norm_hidden.weight": (facts.hidden_size,),
            f"{self._mtp_prefix}pre_fc_norm_embedding.weight": (facts.hidden_size,),
        }
        for layer in range(facts.n_blocks):
            prefix = self.layer_prefix(layer)
            found |= {
                prefix + name: shape
                for name, shape in layer_shapes(facts, self.deltanet, self.text_reader).items()
            }
        return found

    def gguf_metadata(self) -> tuple[HeaderValue, ...]:
        return text_header(self.facts, self.deltanet, self.text_reader, self.layer_kinds)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        # the key must agree with the tensors, which some re-saved sources have lost
        changes = dict.fromkeys(_COUNT_KEYS, n_experts) | {MTP_KEY: int(self.facts.has_mtp)}

        def rewrite(values: Mapping[str, Any]) -> dict[str, Any]:
            return {key: changes.get(key, value) for key, value in values.items()}

        text = rewrite(self.text)
        if self.facts.has_mtp:
            text[MTP_KEY] = 1
        if self.text is self.config:
            return text
        return rewrite(self.config) | {"text_config": text}

    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        names = self._names_in(layer)
        inside = "layers.0." if layer == self.facts.mtp_layer else ""
        found = {
            inside + paths[0]: tuple(f"blk.{layer}.{names[f'{path}.weight']}" for path in paths)
            for paths in SHARED_INPUTS
            if f"{paths[0]}.weight" in names
        }
        if layer == self.facts.mtp_layer:
            found["fc"] = (f"blk.{layer}.nextn.eh_proj.weight",)
        return found

    def column_order(self, name: str) -> npt.NDArray[np.int64] | None:
        if name.endswith(".ssm_out.weight"):
            return self.deltanet.value_order(self.deltanet.value_dim)
        return None

    def side_files(self, folder: Path, stored: Mapping[str, StoredTensor]) -> tuple[SideFile, ...]:
        if not any(name.startswith(_VISION) for name in self.names):
            return ()
        return (vision_projector(self.reader, folder, stored, self.facts.hidden_size),)

    def config_at_odds(self) -> str | None:
        claimed = self.text.get(MTP_KEY) or 0
        if bool(claimed) is self.facts.has_mtp:
            return None
        there = "is there" if self.facts.has_mtp else "is not there"
        return f"config.json says {MTP_KEY} {claimed}, but the mtp block {there}"

    def caveats(self) -> tuple[str, ...]:
        found = []
        if any(name.startswith(_VISION) for name in self.names):
            found.append(
                "experts are observed on text alone; the vision tower stays as it is, but experts "
                "that only images need may be among those that go"
            )
        claimed = self.text.get(MTP_KEY) or 0
        if claimed and not any(self._in_mtp(name) for name in self.names):
            found.append("the config names an MTP block that the checkpoint does not hold")
        return tuple(found)
