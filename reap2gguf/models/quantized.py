"""Quantized checkpoints that are refused, and the key that merged ones keep from their past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.quantized.keys import ADVICE, sections_of, without_quantization
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor

__all__ = ["leftover_caveats", "quantization_keys", "refuse_quantized", "without_quantization"]
FLOATS = ("F32", "F16", "BF16")  # what weights may be stored as
# what the tensors beside a quantized weight are called: by FP8, compressed-tensors, GPTQ, AWQ,
# bitsandbytes and MLX
_COMPANIONS = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".input_scale",
    ".weight_packed",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".SCB",
    ".weight_format",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".biases",
    "_scale_inv",
    "_scales",
    "_blocks",
    "_packed",
)
_COMPANION_PARTS = (".quant_state.",)


def quantization_keys(config: Mapping[str, Any]) -> dict[str, str]:
    """The keys that say that a config's model is quantized, nested ones included, and the method.

    >>> quantization_keys({"quantization_config": {"quant_method": "fp8"}})
    {'quantization_config': "'fp8'"}
    """
    return {
        key: shown(value.get("quant_method") if isinstance(value, Mapping) else value)
        for key, value in sections_of(config).items()
    }


def leftover_caveats(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What is said of a config that calls weights quantized which are not."""
    return tuple(
        f"config.json has a leftover {key} ({method}), but no stored weight is quantized: the key "
        "is ignored, and the pruned config.json does not have it"
        for key, method in quantization_keys(config).items()
    )


def refuse_quantized(
    weights: Mapping[str, StoredTensor], where: str, config: Mapping[str, Any]
) -> None:
    """Refuse weights that are quantized, or stored as anything but F32, F16 and BF16.

    The stored tensors decide: a `quantization_config` alone may be left over from a model that was
    merged or dequantized since.
    """
    said = next((f" ({key}: {how})" for key, how in quantization_keys(config).items()), "")
    for name, tensor in weights.items():
        is_companion = name.endswith(_COMPANIONS) or any(p in name for p in _COMPANION_PARTS)
        if not is_companion and tensor.dtype in FLOATS:
            continue
        if tensor.dtype == "F64":
            raise UnsupportedModelError(
                f"tensor {name!r} is stored as F64, expected F32, F16 or BF16; convert the "
                "checkpoint to BF16 first"
            )
        stored = "" if is_companion else f" is stored as {tensor.dtype}"
        belongs = " belongs to a quantized weight" if is_companion else ""
        raise UnsupportedModelError(
            f"{where}: tensor {name!r}{stored}{belongs}: the weights are quantized{said} in a way "
            f"that is not decoded; {ADVICE}"
        )
