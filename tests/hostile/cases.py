"""All cases, and those without a fault, which show that a case is broken by its fault alone."""

from __future__ import annotations

from tests.hostile.artifact_cases import BUNDLES, OBSERVATIONS
from tests.hostile.config_cases import CONFIGS
from tests.hostile.gguf_cases import GGUFS, IMATRICES, QUANTIZE
from tests.hostile.place_cases import ARGUMENTS, PLACES, cache
from tests.hostile.quantized_cases import QUANTIZED
from tests.hostile.room import PLAN, Case
from tests.hostile.shard_cases import INDEXES, SHARDS
from tests.hostile.text_cases import CALIBRATIONS, HEAD, RECIPES, TOKENIZERS, recipe

CASES = [
    *SHARDS, *INDEXES, *CONFIGS, *GGUFS, *IMATRICES, *OBSERVATIONS, *BUNDLES, *TOKENIZERS,
    *RECIPES, *CALIBRATIONS, *PLACES, *ARGUMENTS, *QUANTIZED,
]  # fmt: skip

SOUND = [
    *[Case(f"plan {name}", lambda room, name=name: ["plan", room.copy(name), *PLAN],
           "6 of 8") for name in ("qwen3", "shards", "qwen35")],
    Case("plan a model of the Hub's cache", lambda room: ["plan", cache(room), *PLAN], "6 of 8"),
    Case("prune", lambda room: [
        "prune", room.copy("qwen3"), "--observations", room.copy("seen.safetensors"), "-o", "out",
    ], "keeps 6 of 8 experts"),
    *[Case(f"quantize by {name}", lambda room, name=name: [
        "quantize", room.copy("qwen3"), "--imatrix", room.copy(name), *QUANTIZE,
    ], "bpw") for name in ("imatrix.gguf", "imatrix.dat")],
    Case("verify a bundle", lambda room: ["verify", room.copy("build") / "name-GGUF"], "verified"),
    Case("verify a pair", lambda room: [
        "verify", room.copy("qwen3"), room.copy("build") / "name-GGUF" / "name-Q8_0.gguf",
    ], "verified"),
    Case("check a recipe", recipe(HEAD), "fits qwen3"),
]  # fmt: skip
