"""How much a model's answers suffer from an error in one tensor: a weight for its kind.

The damage of a type is the error of a matrix's products, relative to the products themselves, times
a weight. For small errors the KL divergence of the whole model is about the sum of such terms
(arXiv 2411.17525 shows it for perplexity, with one weight per tensor).

The weights below were measured, and are no law: for each tensor of a model with four layers and 16
experts (tiny-qwen3-moe), the mean KL divergence with this tensor alone as Q2_K, divided by the
relative error, on 1,024 tokens of a text that no result is measured on; then the sum over the
layers. A layer has its share of the sum, since every layer adds to the same hidden state: the same
relative error in all of many layers does not do more than in all of a few. bench/RESULTS.md has the
figures. Kinds that this model does not have get the weight of what is most like them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LAYER = re.compile(r"blk\.\d+\.")
# weights outside the layers, and of an embedding that is the output matrix as well
_EMBEDDING, _OUTPUT, _TIED = 0.8, 1.4, 2.2
# what the name of a layer's tensor contains -> the weight of all layers together; the first counts
_WEIGHTS = (
    ("attn_qkv", 1.4),
    ("attn_v", 1.4),
    ("attn_kv", 1.4),
    ("attn_k", 0.6),
    ("attn_q", 0.4),
    ("attn_output", 1.3),
    ("ssm_out", 1.3),
    ("ffn_down", 1.05),
    ("ffn_gate", 0.75),
    ("ffn_up", 0.5),
)
_USUAL = 1.0


def kind_of(name: str) -> str:
    """A GGUF tensor's name without its layer."""
    return _LAYER.sub("", name)


def sensitivities(names: Iterable[str]) -> dict[str, float]:
    """The weight of each tensor's relative error; `names` are all matrices of the model."""
    names = list(names)
    counts = Counter(map(kind_of, names))
    outside = {
        "token_embd.weight": _EMBEDDING if "output.weight" in names else _TIED,
        "output.weight": _OUTPUT,
    }
    found = {}
    for name in names:
        of_layer = next((weight for part, weight in _WEIGHTS if part in name), _USUAL)
        found[name] = outside.get(name, of_layer) / counts[kind_of(name)]
    return found
