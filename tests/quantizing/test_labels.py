"""Which file llama.cpp and the Hub find by a label."""

from __future__ import annotations

import pytest

from reap2gguf.errors import RecipeError
from reap2gguf.quantizing.labels import (
    LabelledFile,
    hub_label,
    hub_note,
    label_fault,
    label_warnings,
    llama_cpp_finds,
    tags_of,
    twice,
)
from reap2gguf.quantizing.recipe import load_recipe, load_recipes, shipped_recipes


def files(*labels: str, name: str = "M-REAP-0.25") -> list[LabelledFile]:
    return [LabelledFile(f"{name}-{label}.gguf", label, f"recipe-{label}") for label in labels]


@pytest.mark.parametrize(
    ("names", "tag", "expected"),
    [
        (["M-Q4_K_M.gguf", "M-IQ4_K_M.gguf"], "Q4_K_M", "M-IQ4_K_M.gguf"),
        (["M-Q4_K_M.gguf", "M-IQ4_K_M.gguf"], "IQ4_K_M", "M-IQ4_K_M.gguf"),
        (["M-Q4_K_M.gguf", "M-IQ4_K_M.gguf"], "M-Q4_K_M", "M-Q4_K_M.gguf"),
        (["M-Q4_K_M.gguf"], "q4_k_m", "M-Q4_K_M.gguf"),
        (["M-Q4_K_M_MIX.gguf", "M-Q4_K_M.gguf"], "Q4_K_M", "M-Q4_K_M.gguf"),
        (["M-BF16.gguf", "M-F16.gguf"], "F16", "M-BF16.gguf"),
        (["M-Q8_0-x-BF16.gguf", "M-Q8_0-x-Q8_0.gguf"], "Q8_0", "M-Q8_0-x-BF16.gguf"),
        (["M-Q4x0.gguf", "M-Q4.0.gguf"], "Q4.0", "M-Q4.0.gguf"),
        (["M-Q4-0.gguf", "M-Q4.0.gguf"], "Q4.0", "M-Q4-0.gguf"),
        (["mmproj-M-F16.gguf", "M-F16.gguf"], "F16", "M-F16.gguf"),
        (["imatrix-Q8_0.gguf"], "Q8_0", None),
        (["M-mtp-x-Q8_0.gguf"], "Q8_0", None),
        (["M-Q8_0.gguf.part", "M-Q8_0.txt"], "Q8_0", None),
        (["M-Q8_0-00002-of-00002.gguf", "M-Q8_0-00001-of-00002.gguf"], "Q8_0",
         "M-Q8_0-00001-of-00002.gguf"),
        (["M-Q8_0-00002-of-00002.gguf"], "Q8_0", None),
        (["M-Q8_0-00001-of-00002.gguf", "M-Q8_0.gguf"], "Q8_0", "M-Q8_0-00001-of-00002.gguf"),
    ],
)  # fmt: skip
def test_llama_cpps_rule(names: list[str], tag: str, expected: str | None) -> None:
    assert llama_cpp_finds(names, tag) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("M-IQ4_K_M.gguf", "Q4_K_M"),
        ("M-IQ4_K_S.gguf", "Q4_K_S"),
        ("M-q4_k_m.gguf", "Q4_K_M"),
        ("M-Q4_K_M_XX.gguf", "Q4_K_M_XX"),
        ("M-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("M-IQ4_XS.gguf", "IQ4_XS"),
        ("M-IQ4_KS.gguf", None),
        ("M-Q2_K_S.gguf", "Q2_K_S"),
        ("M-Q4_0_4_4.gguf", "Q4_0"),
        ("M-BF16.gguf", "BF16"),
        ("M-BF16-Q8_0.gguf", "Q8_0"),
        ("M-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("mmproj-M-F16.gguf", "F16"),
        ("M.gguf", None),
    ],
)
def test_the_hubs_rule(name: str, expected: str | None) -> None:
    """Cases of @huggingface/gguf."""
    assert hub_label(name) == expected


def test_shipped_recipes_hide_each_other_only_with_a_warning() -> None:
    labels = {name: load_recipe(name).label for name in shipped_recipes()}
    made = [LabelledFile(f"M-{label}.gguf", label, name) for name, label in labels.items()]
    (warning,) = label_warnings(made)
    assert warning == (
        "`llama-server -hf OWNER/NAME:Q4_K_M` opens M-IQ4_K_M.gguf, and not M-Q4_K_M.gguf (the Hub "
        "and Ollama see both as Q4_K_M); build with --label unsloth-iq4km=Q4_K_M_MIX to tell them "
        "apart"
    )
    for alone in made:
        assert label_warnings([alone]) == []


@pytest.mark.parametrize(
    "labels",
    [
        ["IQ4_K_M", "Q4_K_M"],
        ["Q4_K_M", "IQ4_K_M", "Q4_K_M_MIX"],
        ["BF16", "F16"],
        ["x-Q8_0", "Q8_0"],
        ["q8_0", "Q8_0"],
    ],
)
def test_the_way_out_that_is_offered_is_one(labels: list[str]) -> None:
    made = files(*labels)
    (warning,) = label_warnings(made)
    recipe, _, label = warning.partition("--label ")[2].split(" ")[0].partition("=")
    renamed = [
        file if file.recipe != recipe else LabelledFile(f"M-REAP-0.25-{label}.gguf", label, recipe)
        for file in made
    ]
    assert renamed != made
    assert label_warnings(renamed) == []


def test_two_files_that_only_the_hub_confuses() -> None:
    (warning,) = label_warnings(files("IQ4_K_M", "Q4_K_M-v2"))
    assert warning == (
        "the Hub and `ollama run hf.co/...` see M-REAP-0.25-IQ4_K_M.gguf and "
        "M-REAP-0.25-Q4_K_M-v2.gguf as one quantization, Q4_K_M; build with --label "
        "recipe-IQ4_K_M=Q4_K_M_MIX to tell them apart"
    )


def test_names_that_hold_what_they_should_not() -> None:
    (warning,) = label_warnings(files("Q8_0", "BF16", name="M-Q8_0-x"))
    assert warning.endswith("pass another --name, which holds no quant type")
    (warning,) = label_warnings(files("Q8_0", name="some-mtp-model"))
    assert "takes no file with 'mtp-' in its name for a model; pass another --name" in warning


def test_every_tag_finds_its_file() -> None:
    made = files("IQ4_K_M", "IQ4_K_S", "Q4_K_M", "Q8_0")
    names = [file.name for file in made]
    tags = tags_of(made)
    assert [tags[name].llama_cpp for name in names] == [
        "IQ4_K_M", "IQ4_K_S", "M-REAP-0.25-Q4_K_M", "Q8_0",
    ]  # fmt: skip
    assert all(llama_cpp_finds(names, tags[name].llama_cpp) == name for name in names)
    assert [tags[name].hub for name in names] == [*names[:3], "Q8_0"]


def test_what_the_hub_shows_for_a_label() -> None:
    assert hub_note("IQ4_K_M") == "the Hub shows files with the label IQ4_K_M as Q4_K_M"
    assert hub_note("Q4_K_M") is None
    assert hub_note("own") is None


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("00001-of-00002", "number of a part"),
        ("Q8_0-00002-of-00003", "number of a part"),
        ("1-of-2", "number of a part"),
        ("mmproj-F16", "'mmproj'"),
        ("MMPROJ", "'mmproj'"),
        ("imatrix", "'imatrix'"),
        ("mtp-Q8_0", "'mtp-'"),
        ("x.gguf", "ending '.gguf'"),
        ("x.GGUF.y", "ending '.gguf'"),
    ],
)
def test_labels_that_programs_take_for_something_else_are_refused(label: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=f"label '{label}' .*{fault}"):
        load_recipes(["q8_0"], {"q8_0": label})


@pytest.mark.parametrize("label", ["Q8_0", "Q4_K_M-of-mine", "1.5bit", "v2-of-3x", "GGUF"])
def test_other_labels_are_taken(label: str) -> None:
    assert label_fault(label) is None
    assert load_recipes(["q8_0"], {"q8_0": label})[0].label == label


def test_labels_that_differ_in_capitals_alone_are_the_same() -> None:
    assert twice(["Q8_0", "BF16", "q8_0"]) == ("Q8_0", "q8_0")
    assert twice(["Q8_0", "Q8_0"]) == ("Q8_0", "Q8_0")
    assert twice(["Q8_0", "BF16"]) is None
