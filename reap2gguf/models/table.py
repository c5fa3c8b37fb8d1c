"""The architectures this program knows. To add one: write its file, then add its line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.deepseek2 import DeepseekV2, DeepseekV3, Glm4MoeLite
from reap2gguf.models.ernie4_5_moe import Ernie45Moe
from reap2gguf.models.facts import COUNT_KEYS
from reap2gguf.models.gemma4 import Gemma4
from reap2gguf.models.glm4_moe import Glm4Moe
from reap2gguf.models.gpt_oss import GptOss
from reap2gguf.models.granite_moe import GraniteMoe, GraniteMoeShared
from reap2gguf.models.kimi_linear import KimiLinear
from reap2gguf.models.lfm2_moe import Lfm2Moe
from reap2gguf.models.minimax_m2 import MiniMaxM2
from reap2gguf.models.mixtral import Mixtral
from reap2gguf.models.nemotron_h import NemotronH
from reap2gguf.models.olmoe import Olmoe
from reap2gguf.models.qwen2_moe import Qwen2Moe
from reap2gguf.models.qwen3_5_moe import Qwen35Moe
from reap2gguf.models.qwen3_moe import Qwen3Moe
from reap2gguf.models.qwen3_next import Qwen3Next
from reap2gguf.models.qwen3_vl_moe import Qwen3OmniMoe, Qwen3VlMoe

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel

ARCHITECTURES: dict[str, type[MoeModel]] = {
    "DeepseekV2ForCausalLM": DeepseekV2,
    "DeepseekV3ForCausalLM": DeepseekV3,
    "Ernie4_5_MoeForCausalLM": Ernie45Moe,
    "Gemma4ForCausalLM": Gemma4,
    "Gemma4ForConditionalGeneration": Gemma4,
    "Glm4MoeForCausalLM": Glm4Moe,
    "Glm4MoeLiteForCausalLM": Glm4MoeLite,
    "GptOssForCausalLM": GptOss,
    "GraniteMoeForCausalLM": GraniteMoe,
    "GraniteMoeSharedForCausalLM": GraniteMoeShared,
    "KimiLinearForCausalLM": KimiLinear,
    "Lfm2MoeForCausalLM": Lfm2Moe,
    "MiniMaxM2ForCausalLM": MiniMaxM2,
    "MixtralForCausalLM": Mixtral,
    "NemotronHForCausalLM": NemotronH,
    "OlmoeForCausalLM": Olmoe,
    "Qwen2MoeForCausalLM": Qwen2Moe,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Qwen3NextForCausalLM": Qwen3Next,
    "Qwen3OmniMoeForConditionalGeneration": Qwen3OmniMoe,
    "Qwen3VLMoeForConditionalGeneration": Qwen3VlMoe,
    "Qwen3_5MoeForCausalLM": Qwen35Moe,
    "Qwen3_5MoeForConditionalGeneration": Qwen35Moe,
}

# Several classes of transformers may be one architecture of llama.cpp.
BY_GGUF: dict[str, list[type[MoeModel]]] = {
    arch: list(dict.fromkeys(one for one in ARCHITECTURES.values() if one.gguf_arch == arch))
    for arch in dict.fromkeys(one.gguf_arch for one in ARCHITECTURES.values())
}

_MAX_LABELS = 2**16


def describe(checkpoint: Weights, keep_mtp: bool = True) -> MoeModel:
    """The model a checkpoint holds, its tensors checked against its config.

    Without `keep_mtp`, a multi-token-prediction block is ignored.

    Raises UnsupportedModelError if its architecture is not in the table or it has no experts,
    CheckpointError if its tensors disagree with its config.
    """
    where = str(checkpoint.shown / "config.json")
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        nested = checkpoint.config.get("text_config")
        configs = [checkpoint.config, nested if isinstance(nested, dict) else {}]
        if not any(key in config for config in configs for key in COUNT_KEYS):
            raise UnsupportedModelError(
                f"{where}: {_named(name) or 'no architecture'} has no experts to prune; "
                "pass a Mixture-of-Experts model"
            )
        raise UnsupportedModelError(
            f"{where}: architecture {_named(name) or '(none)'} is not implemented, expected one "
            f"of {', '.join(ARCHITECTURES)}"
        )
    _refuse_labels(checkpoint.config, where)
    return ARCHITECTURES[name].of(checkpoint, keep_mtp)


def _named(name: Any) -> str:
    """An architecture's name, as it is where it could be one; empty if there is none."""
    plain = isinstance(name, str) and name.isidentifier() and len(name) < 100
    return name if plain else shown(name) if name else ""


def _refuse_labels(config: Mapping[str, Any], where: str) -> None:
    """Refuse classes by the million: transformers names each of them when it reads the config."""
    ConfigReader(config, where).integer("num_labels", high=_MAX_LABELS, default=0)
    for part in config.values():
        if isinstance(part, Mapping):
            _refuse_labels(part, where)
