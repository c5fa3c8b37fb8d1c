"""What texts of other programs say: rules, file types, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.errors import RecipeError
from reap2gguf.importing.foreign import ForeignRecipe, read_foreign, text_of_file
from reap2gguf.importing.imported import imported
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import parse_recipe
from tests.importing.test_command_line import SCRIPT


def rules(text: str) -> list[tuple[str, str, str]]:
    """What each rule finds, in which layers, and its type."""
    found = [one.rule for one in read_foreign(text, "here").rules]
    return [(one.selector.words, one.layers, one.tensor_type.name) for one in found]


def base(text: str) -> str:
    return read_foreign(text, "here").base.name


def test_a_list_in_lines_and_with_commas() -> None:
    text = (
        "## head\n# a comment, with = and commas\n^output\\.weight$=q8_0\n\n"
        "attn_v=Q6_K,attn_k=iq4_xs # why\n  ^blk\\.([0-3])\\.ffn_up_exps\\.weight$=q5_k  \r\n"
    )
    assert rules(text) == [
        ("output.weight", "", "Q8_0"),
        ("/attn_v/", "", "Q6_K"),
        ("/attn_k/", "", "IQ4_XS"),
        ("blk.*.ffn_up_exps.weight in layers 0-3", "0-3", "Q5_K"),
    ]


def test_a_script() -> None:
    found = read_foreign(SCRIPT, "here")
    assert [(one.rule.match, one.rule.tensor_type.name) for one in found.rules] == [
        (r"blk\..*\.attn_q.*", "Q8_0"),
        (r"blk\.(0|47)\.ffn_down_exps\.weight", "Q6_K"),
    ]
    assert found.base.name == "IQ4_XS"


def test_letters_of_tensor_type_are_made_small() -> None:
    assert rules("--tensor-type ATTN_V=q8_0 Q4_K_M") == [("/attn_v/", "", "Q8_0")]
    assert rules("--custom-q ATTN_V=q8_0 Q4_K_M") == [("/ATTN_V/", "", "Q8_0")]
    assert rules("ATTN_V=q8_0") == [("/ATTN_V/", "", "Q8_0")]


def test_the_order_of_rules() -> None:
    text = (
        "llama-quantize --tensor-type a=q8_0 --pure --token-embedding-type q6_K --custom-q b=q8_0 "
        "--output-tensor-type q5_K in.gguf Q4_K_M"
    )
    assert rules(text) == [
        ("output.weight", "", "Q5_K"),
        ("token_embd.weight", "", "Q6_K"),
        ("/a/", "", "Q8_0"),
        ("*", "", "Q4_K"),
    ]
    assert "ignores --custom-q" in " ".join(read_foreign(text, "here").notes)
    both = "--leave-output-tensor --output-tensor-type q5_K in.gguf Q4_K_M"
    assert rules(both) == [("output.weight", "", "BF16")]
    assert rules("--pure a.gguf MXFP4_MOE") == [("*", "", "MXFP4")]


def test_files_of_rules(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("ATTN_V=q8_0 attn_k=q6_K\nffn_up=q5_K\n")
    assert rules(f"llama-quantize --tensor-type-file {path} m.gguf Q4_K_M") == [
        ("/attn_v/", "", "Q8_0"), ("/attn_k/", "", "Q6_K"), ("/ffn_up/", "", "Q5_K"),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"here: --tensor-type-file .*x.txt: cannot be read"):
        rules("llama-quantize --tensor-type-file x.txt m.gguf Q4_K_M")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("llama-quantize in.gguf out.gguf Q4_K_M 16", "Q4_K_M"),
        ("llama-quantize in.gguf q5_k", "Q5_K_M"),
        ("llama-quantize in.gguf out.gguf 15 8", "Q4_K_M"),
        ("llama-quantize in.gguf 7", "Q8_0"),
        ("--tensor-type a=q8_0 Q6_K 8", "Q6_K"),
        ("a=q8_0,b=q4_K,c=q4_K,d=f32,e=f32,f=f32", "Q4_K_M"),
        ("a=iq4_xs", "IQ4_XS"),
        ("a=mxfp4", "Q4_K_M"),
        ("a=f32", "Q4_K_M"),
    ],
)
def test_the_file_type(text: str, expected: str) -> None:
    assert base(text) == expected


def test_another_base() -> None:
    assert read_foreign("a=q8_0", "here", "unsloth-q4kxl").base.name == "unsloth-q4kxl"
    found = read_foreign("llama-quantize --custom-q a=q8_0 m.gguf Q8_KV", "here", "q5_k_m")
    assert found.base.name == "Q5_K_M"
    with pytest.raises(RecipeError, match=r"--base my.toml: expected a name that"):
        read_foreign("a=q8_0", "here", "my.toml")


def test_patterns_do_not_count_where_nothing_is_quantized() -> None:
    found = read_foreign("--tensor-type a=q8_0 --output-tensor-type q6_K in.gguf F16", "here")
    assert [one.text for one in found.rules] == ["--output-tensor-type Q6_K"]
    assert "no pattern counts in a file of F16" in found.notes[-1]
    assert rules("--leave-output-tensor m.gguf F32") == [("output.weight", "", "BF16")]


def test_types_of_another_order() -> None:
    found = read_foreign("attn_v=q4_k_r4,attn_k=iq4_xs_r8", "here")
    assert [one.rule.tensor_type.name for one in found.rules] == ["Q4_K", "IQ4_XS"]
    assert "q4_k_r4 became q4_k: the same values" in found.notes[0]


def test_types_of_ik_llama_cpp() -> None:
    """They are for files that ik_llama.cpp alone loads, whose labels say so."""
    found = read_foreign("attn_v=q8_0,ffn=iq4_ks_r4,attn=iq4_ks,embd=iq5_k", "here")
    kinds = [one.rule.tensor_type.name for one in found.rules]
    assert kinds == ["Q8_0", "IQ4_KS", "IQ4_KS", "IQ5_K"]
    assert found.base.name == "IQ4_KS"
    recipe = imported(found, "mine")
    assert recipe.recipe.label == "ik-IQ4_KS_MIX"
    again = parse_recipe(recipe.as_toml(), "again", "again.toml")
    assert [rule.tensor_type.name for rule in again.rules][:4] == kinds
    assert again.is_ik
    assert base("llama-quantize --custom-q a=iq4_ks m.gguf IQ4_KSS") == "IQ4_KSS"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "here: has no rule; expected a llama-quantize command, or lines"),
        ("# nothing", "has no rule"),
        ("a=q8_0\nhello", "here, line 2: 'hello' is not PATTERN=TYPE, such as attn_v=q8_0"),
        ("=q8_0", "line 1: '=q8_0' is not PATTERN=TYPE"),
        ("a=", "line 1: 'a=' is not PATTERN=TYPE"),
        ("a=q4_k_m", "here, line 1: a: type 'q4_k_m' is not a GGML tensor type; Q4_K_M is a file"),
        ("\na(=q8_0", r"here, line 2: pattern 'a\(' is not a regular expression on tensor names"),
        ("a=q1_0", "here, line 1: a: type 'q1_0' is not supported: it holds only the sign"),
        (
            "a=q6_0,b=q6_0,c=q8_k_r8",
            r"here: q6_0 \(2 rules\), q8_k_r8 exist only in ik_llama.cpp, .*; write another type",
        ),
        ("a=iq2_bn", "iq2_bn exists only in ik_llama.cpp"),
        ("--output-tensor-type q6_0 m.gguf Q4_0", "--output-tensor-type: q6_0 exists only in"),
        ("llama-quantize m.gguf Q8_KV", "file type 'Q8_KV' exists only in .*; pass --base with"),
        (
            "llama-quantize --custom-q a=iq4_ks m.gguf Q4_K_M",
            "iq4_ks exists only in .*, and a file of Q4_K_M is one for llama.cpp; pass --base IQ4_",
        ),
        ("llama-quantize m.gguf Q1_0", "file type 'Q1_0' is not supported: it holds only the"),
        ("llama-quantize --tensor-type a=q8_0 m.gguf", "names no file type such as Q4_K_M"),
        ("llama-quantize m.gguf out.gguf 999", "names no file type"),
        ("a=q8_0\n" * 1001, "over 1,000 rules"),
        ("#" * 300_000, "over 262,144 bytes"),
    ],
)
def test_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_foreign(text, "here")


def test_only_one_output_type_is_kept_for_tied_embeddings() -> None:
    def tied(text: str) -> ForeignRecipe:
        return read_foreign(f"--output-tensor-type q5_K {text}", "here")

    found = tied("m.gguf Q4_K_M").tied_output
    assert found is not None
    assert found.name == "Q5_K"
    for other in ("--token-embedding-type q8_0 m.gguf Q4_0", "--pure m.gguf Q4_0", "m.gguf F16"):
        assert tied(other).tied_output is None


_PIECES = st.sampled_from(
    ["llama-quantize", "--tensor-type", "--custom-q", "--pure", "attn_v=q8_0", "a(=q4_K", "=", ",",
     "\n", " ", "#", "'", '"', "\\", "$x", "x=", "$(", ")", "Q4_K_M", "15", "m.gguf", "|", "{9}"]
)  # fmt: skip


@given(st.lists(_PIECES | st.text(max_size=3), max_size=14).map("".join))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        found = read_foreign(text, "here")
    except RecipeError as error:
        assert "\n" not in str(error)
        return
    assert found.base.name in MIXTURES
    assert all(one.rule.match for one in found.rules)


def test_blanks_around_an_equals_sign_and_words_that_are_nothing(tmp_path: Path) -> None:
    assert rules("attn_v = q8_0  # why\nattn_k =q6_k") == rules("attn_v=q8_0\nattn_k=q6_k")
    with pytest.raises(
        RecipeError, match=r"here: 'their\.recipe' is neither a file, nor a llama-quant"
    ):
        read_foreign("their.recipe", "here")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(
        RecipeError, match=r"x\.gguf: a GGUF file; `reap2gguf recipes of .*x\.gguf`"
    ):
        text_of_file(file)
    with pytest.raises(RecipeError, match=r"none: cannot be read \(No such file or directory\)$"):
        text_of_file(tmp_path / "none")
