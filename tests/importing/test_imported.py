"""Imported recipes give the types that llama.cpp chooses for the same command."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from reap2gguf.importing.foreign import read_foreign
from reap2gguf.importing.imported import ImportedRecipe, ModelTensors, imported
from reap2gguf.quantizing.file_types import MIXTURES
from tests.exporting.files import types_of_llama_cpp
from tests.importing.headers import Unquantized, unquantized
from tests.tiny import TinyQwen3Moe

WIDE = TinyQwen3Moe(hidden=256, width=256, head_dim=64, n_layers=9, vocab=512)
# rows of 64 and 32 do not fill the blocks of most types
NARROW = TinyQwen3Moe(hidden=64, width=32, n_layers=3, vocab=512, tied=True)


@dataclass(frozen=True)
class Model:
    """A tiny model, and what is imported for it."""

    file: Unquantized

    def imported(self, text: str, compared: bool = True) -> ImportedRecipe:
        model = ModelTensors("tiny", self.file.tensors, self.file.facts)
        return imported(read_foreign(text, "here"), "mine", model if compared else None)

    def types(self, text: str, compared: bool = True) -> dict[str, str]:
        return self.file.types_by(self.imported(text, compared).as_toml())


@pytest.fixture(scope="module", params=[WIDE, NARROW], ids=["wide", "narrow"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(unquantized(request.param, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(unquantized(WIDE, tmp_path_factory.mktemp("wide")))


def chosen(
    model: Model, file_type: str, patterns: list[tuple[str, str]], **options: object
) -> dict[str, str]:
    """What llama.cpp chooses, given the same patterns; std::regex reads them there."""
    number = int(MIXTURES[file_type].file_type)
    numbers = [(pattern, int(Type[kind])) for pattern, kind in patterns]
    return types_of_llama_cpp(model.file.path, number, model.file.importance, numbers, **options)


PATTERNS = [
    [("attn_v", "Q8_0"), ("ffn_down", "Q6_K")],
    [("output", "Q8_0")],
    [("attn_q", "F16"), ("attn", "Q5_K"), ("attn_v", "Q8_0")],
    [(r"blk\.[0-3]\.ffn_down_exps", "Q6_K"), (r"blk\.([4-9])\.ffn_.*_exps\.weight$", "IQ4_XS")],
    [(r"^blk\.(0|[2-4]|8)\.attn_(q|k)\.weight$", "Q4_0"), (".*", "Q5_K")],
    [(r"^blk\.([0-9]|1[0-5])\.attn_v\.weight$", "Q8_0"), (r"^output\.weight$", "BF16")],
    [(r"blk\.\d+\.ffn_(gate|up)_exps", "Q3_K"), (r"\bffn_down", "Q2_K"), ("token_embd", "Q4_1")],
    [("blk.1", "Q8_0"), ("ffn_gate_inp", "Q8_0"), ("norm", "F16"), ("nothing", "Q8_0")],
    [("[[:digit:]]{1,2}.attn_k.w", "Q5_0"), ("_exps?.weight", "IQ3_S"), ("(?:em){1}b", "Q6_K")],
]


def with_words(patterns: list[tuple[str, str]], *more: str) -> str:
    options = [f"--tensor-type '{pattern}={kind.lower()}'" for pattern, kind in patterns]
    return " ".join(["llama-quantize", *options, *more])


@pytest.mark.parametrize("patterns", PATTERNS, ids=lambda patterns: patterns[0][0])
@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q4_K_S", "IQ2_M"])
def test_patterns(model: Model, file_type: str, patterns: list[tuple[str, str]]) -> None:
    text = with_words(patterns, "m.gguf", file_type)
    expected = chosen(model, file_type, patterns)
    assert model.types(text) == expected
    rules = model.imported(text).rules
    decides_nothing = {"comes too late", "never quantized", "F32 anyway"}
    if not any(one.fate in decides_nothing for one in rules):
        assert model.types(text, compared=False) == expected


CHOICES = {
    "output": ("--output-tensor-type q5_k", {"output_tensor_type": int(Type.Q5_K)}),
    "embedding": ("--token-embedding-type q8_0", {"token_embedding_type": int(Type.Q8_0)}),
    "pure": ("--pure", {"pure": True}),
    "left": ("--leave-output-tensor", {"quantize_output_tensor": False}),
}


@pytest.mark.parametrize("patterns", [[], [("ffn_down|embd|output", "Q6_K")]], ids=["", "patterns"])
@pytest.mark.parametrize(
    "names",
    [some for n in (1, 2, 4) for some in itertools.combinations(CHOICES, n)],
    ids="-".join,
)
@pytest.mark.parametrize("file_type", ["Q4_K_M", "MXFP4_MOE", "F16"])
def test_options(
    wide: Model, file_type: str, names: tuple[str, ...], patterns: list[tuple[str, str]]
) -> None:
    compare_options(wide, file_type, names, patterns)


@pytest.mark.parametrize("patterns", [[], [("ffn_down", "Q6_K")], [("embd", "Q4_0")]])
@pytest.mark.parametrize("names", [("output",), ("output", "pure")], ids="-".join)
def test_the_output_of_tied_embeddings(
    model: Model, names: tuple[str, ...], patterns: list[tuple[str, str]]
) -> None:
    compare_options(model, "Q4_0", names, patterns, kind="q8_0")


def compare_options(
    model: Model,
    file_type: str,
    names: tuple[str, ...],
    patterns: list[tuple[str, str]],
    kind: str = "q5_k",
) -> None:
    words, options = [], {}
    for name in names:
        word, fields = CHOICES[name]
        words.append(word.replace("q5_k", kind))
        options |= {
            one: int(Type[kind.upper()]) if one == "output_tensor_type" else value
            for one, value in fields.items()
        }
    text = with_words(patterns, *words, "m.gguf", file_type)
    assert model.types(text) == chosen(model, file_type, patterns, **options)


def test_random_patterns(wide: Model) -> None:
    """Of parts of names, groups, sets and repeats, as std::regex reads them."""
    draw = random.Random(2)
    parts = [
        "blk", r"\.", "[0-4]", "(1|3|5)", r"\d", "attn", "_", "(q|k|v)", "ffn", ".*", "(up|down)",
        "exps?", "[a-z]+", "weight", "$", "^", "output", "[^q]", r"\w{3}", "(?:norm|embd)",
    ]  # fmt: skip
    kinds = ["Q8_0", "Q6_K", "Q5_K", "Q4_0", "IQ4_NL", "BF16"]
    n_ruled = 0
    for _ in range(40):
        patterns = [
            ("".join(draw.choices(parts, k=draw.randint(1, 4))), draw.choice(kinds))
            for _ in range(draw.randint(1, 5))
        ]
        text = with_words(patterns, "m.gguf", "Q4_K_S")
        found = wide.imported(text)
        assert wide.file.types_by(found.as_toml()) == chosen(wide, "Q4_K_S", patterns), patterns
        n_ruled += sum(one.fate == "kept" for one in found.rules)
    assert n_ruled > 20


def test_what_is_said_of_each_rule(wide: Model) -> None:
    text = (
        "attn_v=q8_0,blk.0.attn_v=f16,attn_norm=f32,ffn_gate_inp=q8_0,attn_qkv=q8_0,attn=q6_K,"
        "ffn_down=q5_k"
    )
    found = wide.imported(text)
    assert [(one.text, one.fate, one.n_decided) for one in found.rules] == [
        ("attn_v=q8_0", "kept", 9),
        ("blk.0.attn_v=f16", "comes too late", 0),
        ("attn_norm=f32", "F32 anyway", 9),
        ("ffn_gate_inp=q8_0", "never quantized", 0),
        ("attn_qkv=q8_0", "matches nothing", 0),
        ("attn=q6_K", "kept", 27),
        ("ffn_down=q5_k", "kept", 9),
    ]
    assert found.rules[5].words == "27 tensors, 9 more before it"
    assert [one.rule.match for one in found.rules if one.is_in_recipe] == [
        "attn_v", "attn_qkv", "attn", "ffn_down",
    ]  # fmt: skip
    left = {"token_embd.weight": 1, "output.weight": 1}
    left |= {f"blk.*.ffn_{one}_exps.weight": 9 for one in ("gate", "up")}
    assert dict(found.unmatched) == left
    remarks = [*found.remarks()]
    assert "attn_qkv=q8_0: matches no tensor" in remarks
    assert (
        "blk.0.attn_v=f16: rules before it take every tensor that it matches; left out" in remarks
    )
    assert any(
        one.startswith("no rule matches token_embd.weight, output.weight,") for one in remarks
    )
    toml = found.as_toml().splitlines()
    assert all(f"# {one}" in toml for one in remarks)
    at = toml.index("[[rules]]  # attn_v=q8_0: 9 tensors")
    assert toml[at + 1 : at + 4] == ['regex = "attn_v"', 'type = "Q8_0"', ""]


def test_rows_that_do_not_fill_blocks(tmp_path: Path) -> None:
    model = Model(unquantized(NARROW, tmp_path))
    found = model.imported("attn=q4_k,ffn=q8_0")
    assert [one.n_fallback for one in found.rules] == [12, 0]
    assert found.rules[0].words == "12 tensors, 12 of another type for their rows"
    assert [one.rule.fallback for one in found.rules] == [True, False]


def test_without_a_model_nothing_is_left_out(wide: Model) -> None:
    found = wide.imported("attn_v=q8_0,attn_norm=f32,nothing=q8_0", compared=False)
    assert all(one.is_in_recipe and one.rule.optional for one in found.rules)
    assert found.resolved is None
    assert found.unmatched == ()
    assert wide.file.types_by(found.as_toml())["blk.3.attn_v.weight"] == "Q8_0"
    tied = wide.imported("--output-tensor-type q5_K m.gguf Q4_K_M", compared=False)
    assert "pass MODEL for those" in " ".join(tied.notes)
