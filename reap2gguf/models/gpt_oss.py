"""gpt-oss (gpt-oss-20b, gpt-oss-120b): attention sinks, sliding windows, and experts with biases.

Stored names follow transformers' `gpt_oss`. Experts are one tensor per layer (3D), transposed, with
the rows of gate and up in turn; they are stored in MXFP4, as published, or in BF16. Each head has a
sink: a logit more in the softmax of its attention, of no token. GGUF names, types and keys are
those of llama.cpp's `gpt-oss`, which knows the windows' pattern and the experts' activation without
keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.description import MAX_WIDTH
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.facts import read_n_layers
from reap2gguf.models.from_gguf import common_config
from reap2gguf.models.full_attention import UNIFORM_FACT_KEYS, refuse_other_types, refuse_tied
from reap2gguf.models.layer_types import FULL
from reap2gguf.models.rope import Rope, check_rotary_width, read_rope
from reap2gguf.models.rules import ATTENTION, ATTN_NORM, QKV_BIASES, TensorRule
from reap2gguf.models.shared import UINT32, DecoderModel, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_SLIDING = "sliding_attention"
_WINDOW = "sliding_window"
_WIDTH = "intermediate_size"
# llama.cpp's pattern of this architecture: the first of two layers has the window
_PATTERN_KEY, _PATTERN = "{arch}.attention.sliding_window_pattern", 2
# what llama.cpp computes experts with: gates are cut at the limit, ups at both sides of it, and the
# activation is (up + 1) * gate * sigmoid(alpha * gate)
_ALPHA, _LIMIT = 1.702, 7.0
_POST_NORM = TensorRule("post_attention_layernorm.weight", "post_attention_norm.weight", "H")
_OUTPUT_BIAS = TensorRule("self_attn.o_proj.bias", "attn_output.bias", "H")
_SINKS = TensorRule("self_attn.sinks", "attn_sinks.weight", "heads")
_ROUTER = (
    TensorRule("mlp.router.weight", "ffn_gate_inp.weight", "E H", always_f32=True),
    TensorRule("mlp.router.bias", "ffn_gate_inp.bias", "E"),
)
_FRACTIONS = (
    "rope_parameters.truncate is false, as published: transformers computes YaRN with fractions of "
    "dimensions, and llama.cpp rounds them, so that it turns a few pairs of each head by other "
    "angles; all GGUF files of this architecture are computed so"
)


class GptOss(DecoderModel):
    """One gpt-oss model."""

    model_type: ClassVar[str] = "gpt_oss"
    gguf_arch: ClassVar[str] = "gpt-oss"
    has_eager_attention: ClassVar[bool] = True
    experts = ExpertLayout(
        orientation="in out", interleaved=True, has_biases=True, module_is_as_stored=True
    )
    count_keys = ("num_local_experts", "num_experts")
    width_key = _WIDTH
    has_attention_biases = True
    fact_keys = (*UNIFORM_FACT_KEYS, _WINDOW, "swiglu_alpha", "swiglu_limit")
    # transformers' values of absent keys, in GptOssConfig
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 8, "head_dim": 64}
    epsilon = ("rms_norm_eps", 1e-5)
    default_theta = 150_000.0

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = common_config(keys)
        why = f"llama.cpp's {cls.gguf_arch} has a window in every second layer"
        keys.expect(_PATTERN_KEY, _PATTERN, why=why)
        keys.expect(Keys.Rope.DIMENSION_COUNT, config["head_dim"], why="whole heads are rotated")
        theta = config["rope_parameters"]["rope_theta"]
        keys.expect("{arch}.rope.freq_base_swa", theta, why="all layers rotate alike")
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": cls.model_type,
            **config,
            "attention_bias": True,
            _WIDTH: config.pop("moe_intermediate_size"),
            "num_local_experts": config.pop("num_experts"),
            _WINDOW: keys.integer(Keys.Attention.SLIDING_WINDOW, 1, MAX_WIDTH),
        }

    def read_facts(self) -> ModelFacts:
        read, arch = self.text, f"llama.cpp's {self.gguf_arch}"
        refuse_other_types(self)
        self.refuse_common()
        read.expect("attention_bias", True, why=f"{arch} has biases in its attention")
        why = f"{arch} computes its experts' activation with this"
        read.expect("swiglu_alpha", _ALPHA, why=why)
        read.expect("swiglu_limit", _LIMIT, why=why)
        why = f"{arch} has a window in every second layer, from the first on"
        read.expect("layer_types", self._layer_types(), why=why)
        facts = self.common_facts(range(read_n_layers(read)))
        refuse_tied(self, facts)
        why = f"{arch} rotates whole heads"
        self.rope.values.expect("partial_rotary_factor", 1, why=why)
        check_rotary_width(self.rope, facts.head_dim, facts.head_dim)
        return facts

    def _layer_types(self) -> list[str]:
        return [FULL if layer % 2 else _SLIDING for layer in range(read_n_layers(self.text))]

    @property
    def _window(self) -> int:
        # transformers' value of an absent key
        return self.text.integer(_WINDOW, low=1, high=MAX_WIDTH, default=128)

    @cached_property
    def rope(self) -> Rope:
        read = self.text
        if not (read.section("rope_scaling") or read.section("rope_parameters")):
            raise UnsupportedModelError(
                f"{read.where}: rope_parameters is missing, expected the settings of the rotary "
                "embedding: transformers takes those of the published models, which need not be "
                "this one's; state them"
            )
        return read_rope(read, default_theta=self.default_theta, may_have_fractions=True)

    def config_values(self) -> dict[str, Any]:
        return {
            **super().config_values(),
            "attention_bias": True,
            "layer_types": self._layer_types(),
            _WINDOW: self._window,
            "swiglu_alpha": _ALPHA,
            "swiglu_limit": _LIMIT,
        }

    def sizes(self) -> Mapping[str, int]:
        return {**super().sizes(), "heads": self.facts.n_heads}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        return (
            ATTN_NORM,
            *ATTENTION,
            *QKV_BIASES,
            _OUTPUT_BIAS,
            _SINKS,
            _POST_NORM,
            *_ROUTER,
        )

    def header(self) -> list[Entry]:
        return [*super().header(), (Keys.Attention.SLIDING_WINDOW, self._window, UINT32)]

    def caveats(self) -> tuple[str, ...]:
        return (*super().caveats(), *((_FRACTIONS,) if self.rope.has_fractions else ()))
