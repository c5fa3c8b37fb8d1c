"""Nemotron-3: Nano and Super."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import NemotronHConfig

from reap2gguf.models.nemotron_h import NemotronH
from tests.models.config_rows import TEXT, Carried, Elsewhere, Read, Refused, Row
from tests.models.drawn import ABSENT, COMMON, DTYPES, FLAGS, HEADS, NUMBERS, Drawn, changes_of
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import save_sharded
from tests.tokens import SMALL_VOCAB as VOCAB
from tests.tokens import special_tokens, write_tokenizer

KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
OLD_KINDS = {"M": "mamba", "*": "attention", "E": "moe"}


@dataclass(frozen=True)
class TinyNemotronH:
    """A Nemotron-3; its biases change which experts are chosen."""

    pattern: str = "ME*E"
    kinds_as: str = "pattern"  # or "names", "old names"
    hidden: int = 64
    width: int = 40
    shared_width: int = 56
    latent: int | None = None
    n_experts: int = 8
    top_k: int = 2
    n_groups: int = 1  # of experts
    groups_per_token: int = 1
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 24
    mamba_heads: int = 8
    mamba_dim: int = 16
    state: int = 16
    mamba_groups: int = 2
    kernel: int = 4
    chunk: int = 16
    vocab: int = VOCAB
    mtp: bool = False
    fused: bool = False  # 3D experts
    normalised: bool = True
    newer: bool = False  # spells infinity as transformers 5 does
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def config(self) -> dict[str, Any]:
        kinds: dict[str, Any] = {"hybrid_override_pattern": self.pattern}
        if self.kinds_as != "pattern":
            names = KINDS if self.kinds_as == "names" else OLD_KINDS
            kinds = {"layers_block_type": [names[letter] for letter in self.pattern]}
        else:
            kinds["num_hidden_layers"] = len(self.pattern)
        mtp = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "attention_bias": False,
            "attention_dropout": 0.0,
            **special_tokens(self.vocab),
            "chunk_size": self.chunk,
            "conv_kernel": self.kernel,
            "expand": 2,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            **kinds,
            "intermediate_size": self.width,
            "layer_norm_epsilon": 1e-5,
            "mamba_head_dim": self.mamba_dim,
            "mamba_hidden_act": "silu",
            "mamba_num_heads": self.mamba_heads,
            "mamba_proj_bias": False,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "mlp_hidden_act": "relu2",
            "moe_intermediate_size": self.width,
            **({"moe_latent_size": self.latent} if self.latent else {}),
            "moe_shared_expert_intermediate_size": self.shared_width,
            "n_group": self.n_groups,
            "n_groups": self.mamba_groups,
            "n_routed_experts": self.n_experts,
            "n_shared_experts": 1,
            "norm_eps": 1e-5,
            "norm_topk_prob": self.normalised,
            "num_attention_heads": self.n_heads,
            "num_experts_per_tok": self.top_k,
            "num_key_value_heads": self.n_kv_heads,
            **(mtp if self.mtp else {}),
            "partial_rotary_factor": 1.0,
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "sliding_window": None,
            "ssm_state_size": self.state,
            "tie_word_embeddings": False,
            "time_step_floor": 0.0001,
            "time_step_limit": [0.0, {"__float__": "Infinity"} if self.newer else math.inf],
            "time_step_max": 0.1,
            "time_step_min": 0.001,
            "topk_group": self.groups_per_token,
            "torch_dtype": "bfloat16",
            "use_bias": False,
            "use_conv_bias": True,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        random = _Random(self.seed, self.dtype)
        hidden = self.hidden
        found = {
            "backbone.embeddings.weight": random.normal(0.5, self.vocab, hidden),
            "backbone.norm_f.weight": random.norm(hidden),
            "lm_head.weight": random.normal(0.3, self.vocab, hidden),
        }
        for number, letter in enumerate(self.pattern):
            found |= self._block(f"backbone.layers.{number}.", letter, random)
        # a generator of its own: without the block, the others keep their values
        return found | (self._mtp(_Random(self.seed + 1, self.dtype)) if self.mtp else {})

    def _block(self, prefix: str, letter: str, random: _Random) -> dict[str, torch.Tensor]:
        mixers = {"M": self._mamba, "*": self._attention, "E": self._experts}
        mixer = {f"{prefix}mixer.{name}": t for name, t in mixers[letter](random).items()}
        return {f"{prefix}norm.weight": random.norm(self.hidden), **mixer}

    def _mamba(self, random: _Random) -> dict[str, torch.Tensor]:
        heads, inner = self.mamba_heads, self.mamba_heads * self.mamba_dim
        mixed = inner + 2 * self.mamba_groups * self.state
        return {
            "in_proj.weight": random.matrix(inner + mixed + heads, self.hidden),
            "conv1d.weight": random.normal(0.4, mixed, 1, self.kernel),
            "conv1d.bias": random.normal(0.2, mixed),
            # steps far above transformers' least
            "dt_bias": random.normal(0.5, heads) - 1,
            "A_log": random.normal(0.7, heads),
            "D": random.normal(0.2, heads) + 1,
            "norm.weight": random.norm(inner),
            "out_proj.weight": random.output(self.hidden, inner),
        }

    def _attention(self, random: _Random) -> dict[str, torch.Tensor]:
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "q_proj.weight": random.matrix(query, self.hidden),
            "k_proj.weight": random.matrix(key, self.hidden),
            "v_proj.weight": random.matrix(key, self.hidden),
            "o_proj.weight": random.output(self.hidden, query),
        }

    def _experts(self, random: _Random) -> dict[str, torch.Tensor]:
        """Router, experts, shared expert and, where there is one, the way to the latent."""
        hidden, entering = self.hidden, self.latent or self.hidden
        bias = random.normal(0.3, self.n_experts).float()
        found = {
            "gate.weight": random.matrix(self.n_experts, hidden) * 2,
            "gate.e_score_correction_bias": bias,
            "shared_experts.up_proj.weight": random.matrix(self.shared_width, hidden),
            "shared_experts.down_proj.weight": random.output(hidden, self.shared_width),
        }
        if self.latent:
            found["fc1_latent_proj.weight"] = random.matrix(self.latent, hidden)
            found["fc2_latent_proj.weight"] = random.matrix(hidden, self.latent)
        up = random.matrix(self.n_experts, self.width, entering)
        down = random.output(self.n_experts, entering, self.width)
        if self.fused:
            return found | {"experts.up_proj": up, "experts.down_proj": down}
        for expert in range(self.n_experts):
            found[f"experts.{expert}.up_proj.weight"] = up[expert].clone()
            found[f"experts.{expert}.down_proj.weight"] = down[expert].clone()
        return found

    def _mtp(self, random: _Random) -> dict[str, torch.Tensor]:
        hidden, prefix = self.hidden, "mtp.layers."
        return {
            f"{prefix}0.eh_proj.weight": random.matrix(hidden, 2 * hidden),
            f"{prefix}0.enorm.weight": random.norm(hidden),
            f"{prefix}0.hnorm.weight": random.norm(hidden),
            **self._block(f"{prefix}0.", "*", random),
            **self._block(f"{prefix}1.", "E", random),
            f"{prefix}1.final_layernorm.weight": random.norm(hidden),
        }

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


class _Random:
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
        """A matrix that adds to the residual stream: a router rarely hangs on the last bit."""
        return self.normal(0.2 * shape[-1] ** -0.5, *shape)


NANO = TinyNemotronH()
SUPER = replace(NANO, pattern="MEM*E", latent=48, top_k=3, mtp=True)
LAYOUTS: dict[str, dict[str, Any]] = {
    "NemotronHForCausalLM": {
        "Super": SUPER,
        "Nano": NANO,
        "Nano, by names": replace(NANO, kinds_as="names", newer=True),
        "3D, by NVIDIA's names": replace(SUPER, kinds_as="old names", fused=True, mtp=False),
        "attention first, in groups": replace(
            NANO, pattern="*EME", n_groups=4, groups_per_token=2, normalised=False
        ),
    },
}
PUBLISHED = {"NemotronHForCausalLM": ("Nano",)}
# whole blocks, but for Nano's experts, whose published widths are none of 256
_WIDE = {"head_dim": 64, "mamba_dim": 64, "mamba_heads": 4}
WIDE = {
    "NemotronHForCausalLM": {**_WIDE, "latent": 256, "shared_width": 768},
    "NemotronHForCausalLM-Nano": {**_WIDE, "width": 160, "shared_width": 320},
}

_LEFT_OUT = ("num_experts", "num_hidden_layers", "hidden_act", "rms_norm_eps", "rope_parameters")
_ROWS: dict[str, Row] = {
    **{key: row for key, row in TEXT.items() if key not in (*_LEFT_OUT, "router_aux_loss_coef")},
    "layers_block_type": Read([KINDS[letter] for letter in "*EMEM"]),
    "tie_word_embeddings": Refused((True, None)),
    "num_logits_to_keep": Carried(2),
    "head_dim": Read(48),
    "max_position_embeddings": Carried(1024),  # nothing is rotated
    "sliding_window": Refused((64,)),
    "intermediate_size": Carried(128),  # of MLPs
    "mlp_hidden_act": Refused(("silu", None)),
    "mlp_bias": Refused((True, None)),
    "use_mamba_kernels": Carried(False),
    "ssm_state_size": Read(32),
    "mamba_num_heads": Read(12),
    "mamba_head_dim": Read(32),
    "mamba_hidden_act": Refused(("gelu", None)),
    "n_groups": Read(4),
    "conv_kernel": Read(3),
    "expand": Carried(3),
    "time_step_min": Refused((0.1, None)),
    "time_step_max": Carried(0.2),
    "time_step_limit": Refused(([0.0, 0.1], None)),
    "time_step_floor": Carried(0.5),
    "use_conv_bias": Refused((False, None)),
    "chunk_size": Carried(32),
    "mamba_proj_bias": Carried(True),
    "mamba_ssm_cache_dtype": Carried("bfloat16"),
    "n_routed_experts": Read(16),
    "n_shared_experts": Read(2),
    "moe_shared_expert_intermediate_size": Read(128),
    "moe_latent_size": Read(24, may_be_null=True),
    "moe_shared_expert_overlap": Carried(False),
    "routed_scaling_factor": Read(1.5),
    "n_group": Read(2),
    "topk_group": Refused((2, None)),  # of one group
    "norm_topk_prob": Read(False),
    "num_nextn_predict_layers": Elsewhere("test_nemotron_h.py"),
    "mtp_layers_block_type": Refused((["moe"], "E*")),
    "use_bias": Refused((True, None)),
    "layer_norm_epsilon": Elsewhere("test_nemotron_h.py"),
    "residual_in_fp32": Carried(True),
    "hidden_dropout": Carried(0.5),
    "rescale_prenorm_residual": Carried(False),
}
# transformers' class -> its table, a config of it, and the family that reads it
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    NemotronHConfig: (_ROWS, replace(NANO, kinds_as="names", vocab=4096), NemotronH),
}

_CHANGES = {
    **COMMON,
    "hybrid_override_pattern": st.sampled_from([ABSENT, None, "", "ME*E", "M*", "ME-*", "*EM", 3]),
    "layers_block_type": st.sampled_from(
        [ABSENT, None, [], ["mamba", "moe", "attention"], ["moe", "mlp"], "ME*", [3]]
    ),
    "moe_latent_size": NUMBERS, "moe_shared_expert_intermediate_size": NUMBERS,
    "n_group": NUMBERS, "topk_group": NUMBERS, "n_groups": NUMBERS, "conv_kernel": NUMBERS,
    "mamba_num_heads": NUMBERS, "mamba_head_dim": NUMBERS, "ssm_state_size": NUMBERS,
    "chunk_size": NUMBERS, "n_shared_experts": NUMBERS, "num_nextn_predict_layers": NUMBERS,
    "use_bias": FLAGS, "mlp_bias": FLAGS, "use_conv_bias": FLAGS, "residual_in_fp32": FLAGS,
    "mlp_hidden_act": st.sampled_from([ABSENT, None, "relu2", "silu"]),
    "time_step_min": st.sampled_from([ABSENT, None, 0.001, 0.0, 0.1, "1"]),
    "time_step_limit": st.sampled_from([ABSENT, None, [0.0, 1e30], [0.0, 0.1], [0.1, 1e30], 3]),
    "routed_scaling_factor": st.sampled_from([ABSENT, None, 1.0, 2.5, 1, 0, -1.0, "1"]),
    "layer_norm_epsilon": COMMON["rms_norm_eps"],
    "mamba_n_groups": NUMBERS, "mamba_conv_bias": FLAGS,
    "model_type": st.sampled_from([ABSENT, None, "nemotron_h", "nemotron", 3]),
}  # fmt: skip


@st.composite
def nemotron(draw: st.DrawFn) -> Drawn:
    n_groups = draw(st.sampled_from([1, 1, 2]))
    n_experts = n_groups * draw(st.integers(2, 3))
    groups_per_token = 1
    n_kv_heads = draw(st.sampled_from([1, 2]))
    mamba_groups = draw(st.sampled_from([1, 2]))
    tiny = TinyNemotronH(
        pattern=draw(st.sampled_from(["ME*", "ME*E", "*EM", "EM*", "MM*E", "M*EME"])),
        kinds_as=draw(st.sampled_from(["pattern", "names", "old names"])),
        hidden=draw(st.sampled_from([32, 64, 40])),
        width=draw(st.sampled_from([8, 24, 32])),
        shared_width=draw(st.sampled_from([16, 24])),
        latent=draw(st.sampled_from([None, 16, 24])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts // n_groups)),
        n_groups=n_groups,
        groups_per_token=groups_per_token,
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 16, 32])),
        mamba_heads=mamba_groups * draw(st.sampled_from([1, 2, 3])),
        mamba_dim=draw(st.sampled_from([8, 16])),
        state=draw(st.sampled_from([16, 32])),
        mamba_groups=mamba_groups,
        kernel=draw(st.sampled_from([4, 4, 2, 3])),
        chunk=draw(st.sampled_from([8, 128])),
        vocab=draw(st.sampled_from([SMALL_VOCAB, 320])),
        mtp=draw(st.booleans()),
        fused=draw(st.booleans()),
        normalised=draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    return Drawn(tiny, draw(HEADS), draw(changes_of(_CHANGES, 2)), ())


# what configs are drawn of
CONFIGS = (nemotron(),)

# What differs from llama.cpp's converter on purpose, each with the reason.
_ALWAYS = {"nemotron_h_moe.rope.freq_base": "nothing is rotated, and no reader uses it"}
DIFFERENCES = {
    "NemotronHForCausalLM": {
        **_ALWAYS,
        "blk.5.ffn_gate_inp.weight": "the converter keeps every router in F32 but that of the MTP "
        "block, which it renames too late; rounded, a router chooses other experts",
    },
    "NemotronHForCausalLM-Nano": _ALWAYS,
}
