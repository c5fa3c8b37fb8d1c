"""Qwen3-VL-MoE, and Qwen3-Omni-MoE, whose thinker has the same text model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Qwen3OmniMoeConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeTextConfig,
    Qwen3OmniMoeThinkerConfig,
)
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig

from reap2gguf.models.qwen3_vl_moe import Qwen3OmniMoe, Qwen3VlMoe
from tests.models.config_rows import EVERY_CONFIG, TEXT, Carried, Elsewhere, Read, Refused, Row
from tests.models.drawn import COMMON, DTYPES, HEADS, Drawn, changes_of, rope_changes
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import VISION_FILES, save_sharded
from tests.tokens import SMALL_VOCAB as VOCAB
from tests.tokens import n_tokens, special_tokens, write_tokenizer

Tensors = dict[str, torch.Tensor]


class Values:
    """Random weights in the checkpoint's type."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def normal(self, deviation: float, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=self._generator) * deviation
        return values.to(self._dtype)

    def norm(self, size: int) -> torch.Tensor:
        return self.normal(0.1, size) + 1

    def matrix(self, *shape: int) -> torch.Tensor:
        """Weights that keep the size of what they multiply."""
        return self.normal(shape[-1] ** -0.5, *shape)

    def output(self, *shape: int) -> torch.Tensor:
        """A matrix that adds to the residual stream."""
        return self.normal(0.3 * shape[-1] ** -0.5, *shape)


@dataclass(frozen=True)
class TinyQwen3Vl:
    """A Qwen3-VL-MoE as published, or as transformers saves it again."""

    n_layers: int = 3
    hidden: int = 64
    width: int = 24
    n_experts: int = 8
    top_k: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    sections: tuple[int, ...] = (8, 4, 4)  # about those of published models
    theta: float = 5e6
    vocab: int = VOCAB
    resaved: bool = False  # experts as (out, in); published ones are (in, out)
    fused: bool = True  # 3D experts
    vision: bool = True
    depth: int = 3  # of the tower
    deepstack: tuple[int, ...] = (0, 2)
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    text_path = "model.language_model."
    head_path = ""

    def config(self) -> dict[str, Any]:
        last = n_tokens(self.vocab) - 1
        return {
            "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            "model_type": "qwen3_vl_moe",
            "image_token_id": last - 1,
            "text_config": self.text_config("qwen3_vl_moe_text"),
            "tie_word_embeddings": self.tied,
            "video_token_id": last,
            "vision_config": self.vision_config("qwen3_vl_moe"),
            "vision_end_token_id": last,
            "vision_start_token_id": last - 1,
        }

    def text_config(self, model_type: str) -> dict[str, Any]:
        return {
            "attention_bias": False,
            **special_tokens(self.vocab),
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "mlp_only_layers": [],
            "model_type": model_type,
            "moe_intermediate_size": self.width,
            "norm_topk_prob": True,
            "num_attention_heads": self.n_heads,
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [*self.sections],
                "rope_type": "default",
            },
            "rope_theta": self.theta,
            "vocab_size": self.vocab,
        }

    def vision_config(self, model_type: str) -> dict[str, Any]:
        return {
            "deepstack_visual_indexes": [*self.deepstack],
            "depth": self.depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "intermediate_size": 48,
            "model_type": model_type,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": self.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }

    def tensors(self) -> Tensors:
        found = self.text()
        if self.vision:
            found |= {f"model.visual.{name}": one for name, one in self.tower().items()}
        return found

    def text(self) -> Tensors:
        values, at = Values(self.seed, self.dtype), self.text_path
        found = {
            at + "embed_tokens.weight": values.normal(0.5, self.vocab, self.hidden),
            at + "norm.weight": values.norm(self.hidden),
        }
        head = values.normal(0.3, self.vocab, self.hidden)
        if not self.tied:
            found[self.head_path + "lm_head.weight"] = head
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        for layer in range(self.n_layers):
            prefix = f"{at}layers.{layer}."
            found |= {
                prefix + "input_layernorm.weight": values.norm(self.hidden),
                prefix + "post_attention_layernorm.weight": values.norm(self.hidden),
                prefix + "self_attn.q_proj.weight": values.matrix(query, self.hidden),
                prefix + "self_attn.k_proj.weight": values.matrix(key, self.hidden),
                prefix + "self_attn.v_proj.weight": values.matrix(key, self.hidden),
                prefix + "self_attn.o_proj.weight": values.output(self.hidden, query),
                prefix + "self_attn.q_norm.weight": values.norm(self.head_dim),
                prefix + "self_attn.k_norm.weight": values.norm(self.head_dim),
                prefix + "mlp.gate.weight": values.matrix(self.n_experts, self.hidden) * 2,
            }
            gate = values.matrix(self.n_experts, self.width, self.hidden)
            up = values.matrix(self.n_experts, self.width, self.hidden)
            down = values.output(self.n_experts, self.hidden, self.width)
            found |= self.experts(prefix + "mlp.experts.", gate, up, down)
        return found

    def experts(self, at: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
        if not self.fused:
            return {
                f"{at}{expert}.{name}.weight": one[expert].clone()
                for name, one in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
                for expert in range(self.n_experts)
            }
        found = {at + "gate_up_proj": torch.cat((gate, up), dim=1), at + "down_proj": down}
        if self.resaved:
            return found
        return {name: one.transpose(1, 2).contiguous() for name, one in found.items()}

    def tower(self) -> Tensors:
        values, size, merged = Values(self.seed + 2, self.dtype), 32, 128
        shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (size, 3, 2, 16, 16)}
        for block in range(self.depth):
            at = f"blocks.{block}."
            shapes |= {at + "attn.qkv": (96, size), at + "attn.proj": (size, size)}
            shapes |= {at + "mlp.linear_fc1": (48, size), at + "mlp.linear_fc2": (size, 48)}
            shapes |= {at + "norm1": (size,), at + "norm2": (size,)}
        mergers = {"merger.": size}
        mergers |= {f"deepstack_merger_list.{i}.": merged for i in range(len(self.deepstack))}
        for at, normed in mergers.items():
            shapes |= {at + "norm": (normed,), at + "linear_fc1": (merged, merged)}
            shapes |= {at + "linear_fc2": (self.hidden, merged)}
        found = {"pos_embed.weight": values.normal(0.1, 16, size)}
        for name, shape in shapes.items():
            around = 1 if len(shape) == 1 else 0
            found[f"{name}.weight"] = values.normal(0.05, *shape) + around
            found[f"{name}.bias"] = values.normal(0.05, shape[0])
        return found

    def write(self, folder: Path) -> Path:
        """Write config, shard, tokenizer and image settings; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        for name, values in VISION_FILES.items() if self.vision else ():
            (folder / name).write_text(json.dumps(values))
        save_sharded(self.tensors(), folder, 1)
        return folder

    def apart(self) -> TinyQwen3Vl:
        """The same text model as transformers loads it by a config that a GGUF header gives."""
        return replace(self, resaved=True, fused=True, vision=False)


@dataclass(frozen=True)
class TinyQwen3Omni(TinyQwen3Vl):
    """A Qwen3-Omni-MoE: its thinker, with what sees and hears, and a little of what speaks."""

    fused: bool = False
    resaved: bool = True

    text_path = "thinker.model."
    head_path = "thinker."

    def config(self) -> dict[str, Any]:
        text = self.text_config("qwen3_omni_moe_text")
        del text["rope_scaling"]["mrope_interleaved"]
        text["rope_scaling"] |= {"interleaved": True, "type": "default"}
        return {
            "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
            "model_type": "qwen3_omni_moe",
            "code2wav_config": {"hidden_size": 32, "num_hidden_layers": 1},
            "enable_audio_output": True,
            "talker_config": {"text_config": {"num_experts": 4, "hidden_size": 32}},
            "thinker_config": {
                "audio_config": {
                    "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
                    "encoder_layers": 1, "model_type": "qwen3_omni_moe_audio_encoder",
                    "num_mel_bins": 16, "output_dim": self.hidden, "downsample_hidden_size": 8,
                },
                "model_type": "qwen3_omni_moe_thinker",
                "text_config": text,
                "vision_config": self.vision_config("qwen3_omni_moe_vision_encoder"),
            },
        }  # fmt: skip

    def tensors(self) -> Tensors:
        found = self.text()
        if not self.vision:
            return found
        for name, one in self.tower().items():
            found[f"thinker.visual.{_as_in_omni(name)}"] = one
        values = Values(self.seed + 3, self.dtype)
        found |= {f"thinker.audio_tower.{name}": one for name, one in _audio(values, self.hidden)}
        talker = "talker.model.layers.0.mlp."
        found[talker + "gate.weight"] = values.matrix(4, 32)
        for expert in range(4):
            at = f"{talker}experts.{expert}."
            found[at + "gate_proj.weight"] = values.matrix(16, 32)
            found[at + "up_proj.weight"] = values.matrix(16, 32)
            found[at + "down_proj.weight"] = values.matrix(32, 16)
        found["code2wav.decoder.0.conv.weight"] = values.matrix(8, 32, 7)
        return found

    def write(self, folder: Path) -> Path:
        """The same, with the table of added tokens that published tokenizers have."""
        super().write(folder)
        path = folder / "tokenizer_config.json"
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        table = {str(token.pop("id")): token for token in added}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": table}))
        return folder

    def apart(self) -> TinyQwen3Vl:
        names = TinyQwen3Vl.__dataclass_fields__
        return TinyQwen3Vl(**{name: getattr(self, name) for name in names}).apart()


def _as_in_omni(name: str) -> str:
    """What Qwen3-Omni calls a tensor of a tower."""
    if "merger" not in name:
        return name
    name = name.replace("deepstack_merger_list", "merger_list").replace(".norm.", ".ln_q.")
    return name.replace("linear_fc1", "mlp.0").replace("linear_fc2", "mlp.2")


def _audio(values: Values, hidden: int) -> list[tuple[str, torch.Tensor]]:
    """The tower for sound: one layer, 16 mel bins."""
    found = []
    shapes: dict[str, tuple[int, ...]] = {"conv2d1": (8, 1, 3, 3)}
    shapes |= {"conv2d2": (8, 8, 3, 3), "conv2d3": (8, 8, 3, 3)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"layers.0.self_attn.{name}"] = (32, 32)
    shapes |= {"layers.0.fc1": (48, 32), "layers.0.fc2": (32, 48)}
    shapes |= {"layers.0.self_attn_layer_norm": (32,), "layers.0.final_layer_norm": (32,)}
    shapes |= {"ln_post": (32,), "proj1": (32, 32), "proj2": (hidden, 32)}
    for name, shape in shapes.items():
        found.append((f"{name}.weight", values.normal(0.05, *shape)))
        found.append((f"{name}.bias", values.normal(0.05, shape[0])))
    found.append(("conv_out.weight", values.normal(0.05, 32, 16)))
    return found


VL = TinyQwen3Vl()
OMNI = TinyQwen3Omni()
LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen3VLMoeForConditionalGeneration": {
        "the Hub's": VL,
        "saved again": replace(VL, resaved=True),
        "tied": replace(VL, tied=True),
        "without tower": replace(VL, vision=False),
        "no deepstack": replace(VL, deepstack=()),
        "wide": replace(VL, hidden=256, width=96, sections=(6, 5, 5)),
    },
    "Qwen3OmniMoeForConditionalGeneration": {
        "the Hub's": OMNI,
        "3D": replace(OMNI, fused=True),
        "without towers": replace(OMNI, vision=False),
    },
}


class TextOfVl(Qwen3VlMoe):
    """A model of the text model's config alone, so that its fields can be changed."""

    def __init__(self, text: Mapping[str, Any], where: str) -> None:
        super().__init__({**VL.config(), "text_config": text}, where)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        found: dict[str, Any] = super().pruned_config(n_experts)["text_config"]
        return found


class ThinkerOfOmni(Qwen3OmniMoe):
    """The same of the thinker's config."""

    def __init__(self, thinker: Mapping[str, Any], where: str) -> None:
        super().__init__({**OMNI.config(), "thinker_config": thinker}, where)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        found: dict[str, Any] = super().pruned_config(n_experts)["thinker_config"]
        return found


class TextOfOmni(ThinkerOfOmni):
    """The same of the config of the thinker's text model."""

    def __init__(self, text: Mapping[str, Any], where: str) -> None:
        super().__init__({**OMNI.config()["thinker_config"], "text_config": text}, where)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        found: dict[str, Any] = super().pruned_config(n_experts)["text_config"]
        return found


@dataclass(frozen=True)
class Section:
    """A part of a checkpoint's config."""

    tiny: TinyQwen3Vl
    path: tuple[str, ...]

    def config(self) -> dict[str, Any]:
        found = self.tiny.config()
        for key in self.path:
            found = found[key]
        scaling = found.pop("rope_scaling", None)
        if scaling is not None:  # where tests look for it
            found["rope_parameters"] = {**scaling, "rope_theta": found.pop("rope_theta")}
        return found


_MOE_TEXT: dict[str, Row] = {
    **TEXT,
    "intermediate_size": Read(128),
    "decoder_sparse_step": Read(2),
    "mlp_only_layers": Read([1], may_be_null=True),
}
_VL_TEXT: dict[str, Row] = {**_MOE_TEXT, "head_dim": Read(64)}
_OMNI_TEXT: dict[str, Row] = {
    **_MOE_TEXT,
    "sliding_window": Refused((16,)),
    "norm_topk_prob": Refused((False,)),
}
_TOKEN = Carried(7)
_WITH_IMAGES: dict[str, Row] = {
    **EVERY_CONFIG,
    "text_config": Refused((None, "absent", {})),
    "vision_config": Elsewhere("test_qwen3_vl_moe.py"),
    "tie_word_embeddings": Elsewhere("test_qwen3_vl_moe.py"),
    "image_token_id": _TOKEN,
    "video_token_id": _TOKEN,
}
_VL: dict[str, Row] = {
    **_WITH_IMAGES,
    "vision_start_token_id": _TOKEN,
    "vision_end_token_id": _TOKEN,
}
_THINKER: dict[str, Row] = {
    **_WITH_IMAGES,
    "audio_config": Carried({"d_model": 16, "encoder_attention_heads": 2}),
    "audio_token_id": _TOKEN,
    "audio_start_token_id": _TOKEN,
    "user_token_id": _TOKEN,
    "position_id_per_seconds": Carried(13),
    "initializer_range": Carried(0.5),
}
_OMNI: dict[str, Row] = {
    **EVERY_CONFIG,
    "thinker_config": Refused((None, "absent", {})),
    "talker_config": Carried({"text_config": {"num_experts": 6}}),
    "code2wav_config": Carried({"hidden_size": 16}),
    "enable_audio_output": Carried(False),
    "initializer_range": Carried(0.5),
    **{
        f"{name}_token_id": _TOKEN
        for name in ("im_start", "im_end", "tts_pad", "tts_bos", "tts_eos", "system", "user")
    },
    "assistant_token_id": _TOKEN,
}
# transformers' class -> its table, a config of it, and the family that reads it
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    Qwen3VLMoeTextConfig: (_VL_TEXT, Section(VL, ("text_config",)), TextOfVl),
    Qwen3VLMoeConfig: (_VL, VL, Qwen3VlMoe),
    Qwen3OmniMoeTextConfig: (
        _OMNI_TEXT,
        Section(OMNI, ("thinker_config", "text_config")),
        TextOfOmni,
    ),
    Qwen3OmniMoeThinkerConfig: (_THINKER, Section(OMNI, ("thinker_config",)), ThinkerOfOmni),
    Qwen3OmniMoeConfig: (_OMNI, OMNI, Qwen3OmniMoe),
}


@st.composite
def qwen3_vl(draw: st.DrawFn, kind: type[TinyQwen3Vl]) -> Drawn:
    n_experts = draw(st.integers(2, 6))
    n_kv_heads = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([8, 16, 32, 32, 24, 12]))
    fitting = tuple((head_dim // 2 + 2 - axis) // 3 for axis in range(3))
    tiny = kind(
        n_layers=draw(st.integers(1, 3)),
        hidden=draw(st.sampled_from([32, 64, 40])),
        width=draw(st.sampled_from([8, 24, 32])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        sections=draw(st.sampled_from([fitting, fitting, fitting, (8, 4, 4), (2, 1, 1)])),
        theta=draw(st.sampled_from([5e6, 1e6, 1e4])),
        vocab=draw(st.sampled_from([SMALL_VOCAB, 320])),
        vision=draw(st.booleans()),
        deepstack=draw(st.sampled_from([(), (0,), (0, 2)])),
        tied=kind is TinyQwen3Vl and draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    either = {"resaved" if kind is TinyQwen3Vl else "fused": draw(st.booleans())}
    text = dict(draw(changes_of(COMMON, 2)))
    if draw(st.integers(0, 3)) == 0:
        text |= draw(rope_changes())
    outer = draw(changes_of(COMMON, 1)) if draw(st.integers(0, 3)) == 0 else ()
    return Drawn(replace(tiny, **either), draw(HEADS), tuple(text.items()), outer)


# what configs are drawn of
CONFIGS = (qwen3_vl(TinyQwen3Vl), qwen3_vl(TinyQwen3Omni))
