from __future__ import annotations

import json
from dataclasses import replace

import pytest
from gguf import GGMLQuantizationType

from reap2gguf.errors import RecipeError
from reap2gguf.models.description import GgufTensor, ModelFacts
from reap2gguf.quantizing.overrides import read_overrides
from reap2gguf.quantizing.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from tests.tiny import REPOSITORY

TYPES = json.loads((REPOSITORY / "tests" / "data" / "qwen3moe-48-layers.types.json").read_text())
N_LAYERS = 48


def tensors_of(
    n_layers: int = N_LAYERS, hidden: int = 2048, width: int = 768, n_experts: int = 128,
    vocab: int = 151936, head_dim: int = 128, tied: bool = False,
) -> list[GgufTensor]:  # fmt: skip
    """The tensors of a Qwen3-30B-A3B, or of a model with other sizes."""
    query, key = 32 * head_dim, 4 * head_dim
    found = [vector("output_norm.weight", hidden), matrix("token_embd.weight", vocab, hidden)]
    if not tied:
        found.append(matrix("output.weight", vocab, hidden))
    for layer in range(n_layers):
        blk = f"blk.{layer}."
        found += [
            vector(f"{blk}attn_norm.weight", hidden),
            vector(f"{blk}ffn_norm.weight", hidden),
            vector(f"{blk}attn_q_norm.weight", head_dim),
            vector(f"{blk}attn_k_norm.weight", head_dim),
            matrix(f"{blk}attn_q.weight", query, hidden),
            matrix(f"{blk}attn_k.weight", key, hidden),
            matrix(f"{blk}attn_v.weight", key, hidden),
            matrix(f"{blk}attn_output.weight", hidden, query),
            GgufTensor(f"{blk}ffn_gate_inp.weight", (n_experts, hidden), (), always_f32=True),
            matrix(f"{blk}ffn_gate_exps.weight", n_experts, width, hidden),
            matrix(f"{blk}ffn_up_exps.weight", n_experts, width, hidden),
            matrix(f"{blk}ffn_down_exps.weight", n_experts, hidden, width),
        ]
    return found


def matrix(name: str, *shape: int) -> GgufTensor:
    return GgufTensor(name, shape, ())


def vector(name: str, size: int) -> GgufTensor:
    return GgufTensor(name, (size,), (), always_f32=True)


def facts_of(n_experts: int = 128, n_kv_heads: int = 4) -> ModelFacts:
    return ModelFacts(
        architecture="Qwen3MoeForCausalLM", gguf_arch="qwen3moe", n_layers=N_LAYERS,
        moe_layers=tuple(range(N_LAYERS)), hidden_size=2048, expert_width=768,
        n_experts=n_experts, experts_per_token=8, n_heads=32, n_kv_heads=n_kv_heads, head_dim=128,
        vocab_size=151936, context_length=262144, tied_embeddings=False,
    )  # fmt: skip


def recipe(*rules: tuple[str, str] | tuple[str, str, bool], file_type: str = "Q4_K_M") -> Recipe:
    text = f'title = "T"\nlabel = "L"\nfile_type = "{file_type}"\n'
    for match, kind, *optional in rules:
        text += f'[[rules]]\nmatch = "{match}"\ntype = "{kind}"\n'
        text += "optional = true\n" if optional else ""
    return parse_recipe(text, "mine", "mine.toml")


def resolved(asked: Recipe, tensors: list[GgufTensor] | None = None) -> ResolvedRecipe:
    return resolve(asked, tensors or tensors_of(), facts_of(), 128, has_imatrix=True)


def kind_names(asked: Recipe, tensors: list[GgufTensor] | None = None) -> dict[str, str]:
    return {name: kind.name for name, kind in resolved(asked, tensors).tensor_types().items()}


def unfold(table: dict[str, dict[str, dict]]) -> dict[str, str]:
    """Tensor name to type, from the compact form of the data file."""
    found = dict(table["outer"])
    for rest, kinds in table["layer"].items():
        found |= {f"blk.{layer}.{rest}": kinds["most"] for layer in range(N_LAYERS)}
        for kind, layers in kinds.get("layers", {}).items():
            found |= {f"blk.{layer}.{rest}": kind for layer in layers}
    return found


@pytest.mark.parametrize("name", TYPES)
def test_types_of_48_layers_are_llama_quantizes(name: str) -> None:
    asked = load_recipe(name) if name in shipped_recipes() else recipe(file_type=name)
    tensors = tensors_of()
    # llama-quantize was run without an imatrix, on a model of two query heads per key-value head
    found = resolve(asked, tensors, facts_of(n_kv_heads=16), 128, has_imatrix=False)
    assert {entry.tensor.name: entry.tensor_type.name for entry in found.table} == unfold(
        TYPES[name]
    )
    assert list(found.tensor_types()) == [tensor.name for tensor in tensors]


def test_order_of_tensors_does_not_matter() -> None:
    forwards = resolved(recipe()).tensor_types()
    assert resolved(recipe(), tensors_of()[::-1]).tensor_types() == forwards


def test_the_first_rule_that_matches_counts() -> None:
    found = resolved(recipe(("blk.0.attn_q.weight", "Q8_0"), ("blk.*.attn_?.weight", "Q6_K")))
    by_name = {entry.tensor.name: entry for entry in found.table}
    first, second = by_name["blk.0.attn_q.weight"], by_name["blk.1.attn_q.weight"]
    assert (first.tensor_type.name, first.rule) == ("Q8_0", "blk.0.attn_q.weight")
    assert (second.tensor_type.name, second.rule) == ("Q6_K", "blk.*.attn_?.weight")
    assert by_name["blk.0.attn_output.weight"].rule is None


def test_a_ruled_value_matrix_is_not_counted() -> None:
    # Q4_K_S gives Q5_K to the first four value matrices that no rule takes
    kinds = kind_names(recipe(("blk.[02].attn_v.weight", "Q8_0"), file_type="Q4_K_S"))
    found = [kinds[f"blk.{layer}.attn_v.weight"] for layer in range(7)]
    assert found == ["Q8_0", "Q5_K", "Q8_0", "Q5_K", "Q5_K", "Q5_K", "Q4_K"]


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'blk\.\*\.attn_qkv\.weight' matches no tensor"):
        resolved(recipe(("blk.*.attn_qkv.weight", "Q8_0")))


def test_an_optional_rule_may_match_nothing() -> None:
    asked = recipe(("blk.*.attn_qkv.weight", "Q8_0", True))
    assert kind_names(asked) == kind_names(recipe())


def test_a_shadowed_rule_is_refused_even_if_optional() -> None:
    wide, narrow = ("blk.*.attn_*t.weight", "Q8_0"), ("blk.0.attn_output.weight", "Q6_K", True)
    message = r"'blk\.0\.attn_output\.weight' is shadowed: .* every tensor it matches"
    with pytest.raises(RecipeError, match=message):
        resolved(recipe(wide, narrow))
    assert kind_names(recipe(narrow, wide))["blk.0.attn_output.weight"] == "Q6_K"


def test_a_rule_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="shadowed"):
        resolved(recipe(("output.weight", "Q8_0"), ("output.weight", "Q8_0")))


def test_a_rule_passes_by_what_stays_f32() -> None:
    kinds = kind_names(recipe(("blk.*.ffn_gate_*.weight", "Q8_0")))
    assert kinds["blk.0.ffn_gate_exps.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"


def test_a_rule_for_nothing_but_what_stays_f32_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"what it matches, such as output_norm\.weight"):
        resolved(recipe(("*norm.weight", "Q8_0")))


def test_a_rule_may_ask_for_f32_where_it_is() -> None:
    assert kind_names(recipe(("output_norm.weight", "F32")))["output_norm.weight"] == "F32"


def test_a_rule_may_leave_a_tensor_unquantized() -> None:
    assert kind_names(recipe(("output.weight", "BF16")))["output.weight"] == "BF16"


def test_a_block_that_does_not_divide_the_row_is_refused() -> None:
    message = r"Q6_K has blocks of 256, and blk\.0\.ffn_down_exps\.weight has rows of 160"
    with pytest.raises(RecipeError, match=message):
        resolved(recipe(("blk.*.ffn_down_exps.weight", "Q6_K")), tensors_of(width=160))


@pytest.mark.parametrize(
    ("kind", "width", "advice"),
    [("Q6_K", 160, "a type with blocks of 32, such as Q8_0"), ("Q8_0", 40, "F16, BF16 or F32$")],
)
def test_the_type_that_is_advised_fits_the_rows(kind: str, width: int, advice: str) -> None:
    with pytest.raises(RecipeError, match=f"rows of {width}; choose {advice}"):
        resolved(recipe(("blk.*.ffn_down_exps.weight", kind)), tensors_of(width=width))


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [("Q6_K", 160, "Q8_0"), ("Q5_K", 160, "Q5_1"), ("IQ2_S", 1408, "IQ4_NL"),
     ("Q5_K", 40, "F16"), ("Q5_K", 256, "Q5_K"), ("Q8_0", 40, "F16")],
)  # fmt: skip
def test_a_rule_may_fall_back_as_llama_quantize_does(kind: str, width: int, expected: str) -> None:
    text = recipe(("blk.*.ffn_down_exps.weight", kind)).as_toml() + "fallback = true\n"
    asked = parse_recipe(text, "mine", "mine.toml")
    assert asked.as_toml() == text
    found = kind_names(asked, tensors_of(n_layers=2, width=width))
    assert {kind for name, kind in found.items() if "ffn_down_exps" in name} == {expected}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_for_rows_of_any_length(name: str) -> None:
    """Experts of GLM-4.5-Air have 1,408 columns, no multiple of 256."""
    found = kind_names(load_recipe(name), tensors_of(n_layers=2, hidden=2880, width=1408))
    of_experts = {kind for name, kind in found.items() if "ffn_down_exps" in name}
    assert of_experts <= {"Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "BF16"}


@pytest.mark.parametrize(
    ("file_type", "attention", "output"),
    [
        ("Q8_0", "Q8_0", "Q8_0"),
        ("Q6_K", "Q8_0", "Q8_0"),
        ("Q5_K_S", "Q5_1", "Q8_0"),
        ("Q4_K_S", "Q5_0", "Q8_0"),
        ("Q4_0", "Q4_0", "Q8_0"),
        ("Q3_K_S", "Q4_0", "Q8_0"),
        ("Q2_K", "Q4_0", "Q8_0"),
        ("IQ4_XS", "IQ4_NL", "Q8_0"),
        ("IQ4_NL", "IQ4_NL", "Q8_0"),
        ("IQ3_S", "IQ4_NL", "Q8_0"),
        ("IQ2_XS", "IQ4_NL", "Q8_0"),
        ("IQ2_XXS", "IQ4_NL", "Q8_0"),
        ("IQ1_M", "IQ4_NL", "Q8_0"),
        ("IQ1_S", "IQ4_NL", "Q8_0"),
        ("Q2_K_S", "Q4_0", "Q8_0"),
        ("Q4_1", "Q4_1", "Q8_0"),
        ("Q5_0", "Q5_0", "Q8_0"),
        ("Q5_1", "Q5_1", "Q8_0"),
        ("MXFP4_MOE", "Q8_0", "Q8_0"),
        ("NVFP4", "Q8_0", "Q8_0"),
        ("TQ1_0", "Q4_0", "Q8_0"),
        ("TQ2_0", "Q4_0", "Q8_0"),
        ("BF16", "BF16", "BF16"),
    ],
)
@pytest.mark.parametrize("hidden", [64, 32])
def test_rows_that_do_not_fill_256_fall_back(
    file_type: str, attention: str, output: str, hidden: int
) -> None:
    kinds = kind_names(recipe(file_type=file_type), tensors_of(2, hidden=hidden, width=32))
    assert kinds["blk.1.attn_q.weight"] == attention
    assert kinds["output.weight"] == output
    assert kinds["blk.1.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q4_1", "Q5_0", "Q5_1", "IQ1_S", "MXFP4_MOE"])
def test_rows_that_fill_no_block_become_f16(file_type: str) -> None:
    kinds = kind_names(recipe(file_type=file_type), tensors_of(2, width=48))
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"


def test_tied_embeddings_are_quantized_as_an_output() -> None:
    assert kind_names(recipe(), tensors_of(tied=True))["token_embd.weight"] == "Q6_K"
    assert kind_names(recipe())["token_embd.weight"] == "Q4_K"


def test_sizes_are_those_of_the_blocks() -> None:
    found = resolved(recipe(file_type="Q8_0"))
    by_name = {entry.tensor.name: entry.n_bytes for entry in found.table}
    assert by_name["output.weight"] == 151936 * 2048 // 32 * 34
    assert by_name["blk.0.ffn_down_exps.weight"] == 128 * 2048 * 768 // 32 * 34
    assert by_name["output_norm.weight"] == 2048 * 4
    assert found.n_bytes == sum(by_name.values())
    assert found.bits_per_weight == pytest.approx(8.5, abs=0.02)


def test_tensors_that_need_importance_are_listed() -> None:
    found = resolved(recipe(("blk.3.attn_q.weight", "IQ2_XXS"), ("output.weight", "IQ4_XS")))
    assert found.needs_importance() == ["blk.3.attn_q.weight"]
    assert found.tensor_types()["blk.3.attn_q.weight"] is GGMLQuantizationType.IQ2_XXS


def needing(asked: Recipe, tensors: list[GgufTensor]) -> set[str]:
    """Names of tensors that need importance, without the number of their layer."""
    return {name.split(".")[-2] for name in resolved(asked, tensors).needs_importance()}


@pytest.mark.parametrize(
    ("file_type", "kind"),
    [("IQ1_S", "Q5_K"), ("IQ2_XXS", "Q5_K"), ("IQ2_M", "Q5_K"), ("IQ3_XXS", "Q5_K"),
     ("Q2_K_S", "Q6_K"), ("Q2_K", "Q2_K"), ("IQ3_S", "IQ3_S"), ("Q4_K_M", "Q4_K")],
)  # fmt: skip
def test_an_embedding_and_a_head_of_the_mtp_blocks_own(file_type: str, kind: str) -> None:
    """No importance matrix has entries for them; llama-quantize refuses the first five files."""
    own = [f"blk.47.nextn.{name}.weight" for name in ("embed_tokens", "shared_head_head")]
    tensors = [*tensors_of(), *(matrix(name, 151936, 2048) for name in own)]
    found = resolved(recipe(file_type=file_type), tensors)
    assert {found.tensor_types()[name].name for name in own} == {kind}
    assert not {*own} & {*found.needs_importance()}
    asked = recipe(("*.nextn.*", "IQ2_XXS"), file_type=file_type)
    assert {*own} <= {*resolved(asked, tensors).needs_importance()}


def test_q2_k_needs_importance_in_files_of_q2_k_s_alone() -> None:
    experts = {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    attention = {"attn_q", "attn_k", "attn_output"}
    # attn_v is Q4_K, and the embeddings are not weighted by llama-imatrix
    assert needing(recipe(file_type="Q2_K_S"), tensors_of()) == experts | attention
    assert needing(recipe(file_type="Q2_K"), tensors_of()) == set()
    narrow = tensors_of(2, hidden=64, width=32, head_dim=2)
    assert needing(recipe(file_type="Q2_K_S"), narrow) == set()
    ruled = recipe(("output.weight", "Q2_K"), ("*_exps.weight", "Q8_0"), file_type="Q2_K_S")
    assert needing(ruled, tensors_of()) == attention


def test_mxfp4_is_for_experts() -> None:
    kinds = kind_names(recipe(file_type="MXFP4_MOE"), tensors_of(2, n_experts=8))
    matrices = {name: kind for name, kind in kinds.items() if kind != "F32"}
    assert {n for n, kind in matrices.items() if kind == "MXFP4"} == {
        name for name in matrices if "_exps" in name
    }
    assert {kind for name, kind in matrices.items() if "_exps" not in name} == {"Q8_0"}


def stored_as_mxfp4(hidden: int, width: int) -> list[GgufTensor]:
    """A model whose experts a checkpoint has in blocks of MXFP4."""
    return [
        replace(one, block_type=GGMLQuantizationType.MXFP4) if "_exps.weight" in one.name else one
        for one in tensors_of(2, hidden=hidden, width=width)
    ]


def of_experts(asked: Recipe, tensors: list[GgufTensor]) -> set[str]:
    return {kind for name, kind in kind_names(asked, tensors).items() if "_exps" in name}


@pytest.mark.parametrize("name", [*shipped_recipes(), "F32", "IQ1_S", "Q2_K", "Q8_0", "MXFP4_MOE"])
def test_experts_in_mxfp4_stay_so_where_no_other_type_is_smaller(name: str) -> None:
    """The rows of gpt-oss fill no blocks of fewer bits."""
    tensors = stored_as_mxfp4(2880, 2880)
    assert of_experts(load_recipe(name), tensors) == {"MXFP4"}
    table = resolved(load_recipe(name), tensors).table
    assert all(entry.is_copied is ("_exps" in entry.tensor.name) for entry in table)
    assert all(entry.wanted is None for entry in table) is (name == "MXFP4_MOE")
    plain = {name: one for name, one in kind_names(load_recipe(name), tensors).items()}
    for tensor, kind in kind_names(load_recipe(name), tensors_of(2, 2880, 2880)).items():
        assert plain[tensor] == kind or "_exps" in tensor, "other tensors are as ever"


def test_smaller_types_are_made_of_experts_in_mxfp4() -> None:
    tensors = stored_as_mxfp4(2048, 768)
    assert of_experts(load_recipe("IQ2_XS"), tensors) <= {"IQ2_XS", "Q2_K", "IQ3_S"}
    assert of_experts(load_recipe("IQ4_XS"), tensors) == {"MXFP4"}  # it has as many bits
    assert of_experts(load_recipe("Q3_K_M"), tensors) == {"Q3_K", "MXFP4"}  # instead of Q5_K


def test_a_strict_rule_is_obeyed_by_experts_in_mxfp4() -> None:
    tensors = stored_as_mxfp4(2880, 2880)
    strict = recipe(("experts.down", "Q8_0"))
    assert of_experts(strict, tensors) == {"Q8_0", "MXFP4"}
    loose = parse_recipe(strict.as_toml() + "fallback = true\n", "mine", "mine.toml")
    assert of_experts(loose, tensors) == {"MXFP4"}
    override = load_recipe("Q4_K_M").with_overrides(read_overrides(("ffn_up_exps=q8_0",)))
    assert of_experts(override, tensors) == {"Q8_0", "MXFP4"}
