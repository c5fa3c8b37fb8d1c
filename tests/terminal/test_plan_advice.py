"""Rows that fit no blocks, and counts of experts that are fast elsewhere, in every plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from reap2gguf.building.needs.estimate import KnownCoverage
from reap2gguf.building.plan import Plan, make_plan
from reap2gguf.options import BuildOptions, ComputeOptions
from reap2gguf.pruning.coverage import importance_record
from reap2gguf.pruning.select import Target
from reap2gguf.terminal.plan_advice import copied_lines, expert_count_lines, odd_row_lines
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.plan_views import plan_lines, up_to_date_or_lines
from tests.building.needs.machines import needs_on
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.models.layouts import FIRST, Case
from tests.quantized import as_mxfp4
from tests.tiny import TinyQwen3Moe


def planned(source: Path, output: Path, **changes: Any) -> Plan:
    options: dict[str, Any] = {"recipes": ("q4km",), "compute": ComputeOptions("cpu"), **changes}
    return make_plan(BuildOptions(model=str(source), output=output, **options))


def block(name: str) -> int:
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[name]][0])


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_odd_rows_of_every_family_are_in_its_plan(case: Case, tmp_path: Path) -> None:
    tiny = case.tiny
    plan = planned(tiny.write(tmp_path / "model"), tmp_path / "out", compression=0.5)
    needs = needs_on(plan)
    (recipe,) = plan.recipes
    (file,) = plan_as_json(plan, needs)["files"]
    columns = {entry.tensor.name: entry.tensor.n_columns for entry in recipe.table}
    assert file["fallbacks"], "a tiny checkpoint has rows that are no multiple of 256"
    for name, tensor_type in file["tensors"].items():
        wanted = file["fallbacks"].get(name)
        assert wanted != tensor_type
        if wanted is not None:
            assert columns[name] % block(wanted)
        assert columns[name] % block(tensor_type) == 0
    text = " ".join("\n".join(plan_lines(plan, needs, False)).split())
    for name, wanted in file["fallbacks"].items():
        line = f"rows of {columns[name]:,} do not fill blocks of {wanted}: "
        assert line in text
        assert f"are {file['tensors'][name]}" in text.partition(line)[2]
    counted = [int(line.partition(": ")[2].split()[0]) for line in odd_row_lines(recipe)]
    assert sum(counted) == len(file["fallbacks"])


def test_rows_that_fill_their_blocks_are_not_mentioned(tmp_path: Path) -> None:
    case = next(one for one in FIRST if one.architecture == "Qwen3MoeForCausalLM")
    source = replace(case.tiny, hidden=256, width=512).write(tmp_path / "model")
    (recipe,) = planned(source, tmp_path / "out", compression=0.5).recipes
    assert list(odd_row_lines(recipe)) == [
        "rows of 64 do not fill blocks of Q4_K: 2 tensors (attn_output) are Q5_0"
    ]


def test_experts_that_stay_as_they_are_stored(tmp_path: Path) -> None:
    source = as_mxfp4(GPT_OSS).write(tmp_path / "model")
    how: dict[str, Any] = {"compression": 0.5, "recipes": ("q4km", "MXFP4_MOE")}
    plan = planned(source, tmp_path / "out", **how)
    said = [list(copied_lines(recipe)) for recipe in plan.recipes]
    stay = "9 tensors stay in the MXFP4 that they are stored in, bit for bit"
    assert said == [[f"{stay}; as Q4_K or Q6_K they would take no fewer bits"], [stay]]
    assert stay in " ".join("\n".join(plan_lines(plan, needs_on(plan), False)).split())
    assert not any("_exps" in line for recipe in plan.recipes for line in odd_row_lines(recipe))
    plain = planned(GPT_OSS.write(tmp_path / "plain"), tmp_path / "out", **how)
    assert [list(copied_lines(recipe)) for recipe in plain.recipes] == [[], []]


def lines_of(total: int, kept: int, n_groups: int = 1) -> list[str]:
    facts = SimpleNamespace(n_experts=total, experts_per_token=8, n_groups=n_groups)
    plan: Any = SimpleNamespace(model=SimpleNamespace(facts=facts), target=Target(total, kept))
    return list(expert_count_lines(plan))


def test_the_count_of_experts_that_llama_cpp_fuses() -> None:
    assert lines_of(128, 64) == lines_of(128, 128) == lines_of(16, 12) == []
    assert lines_of(128, 96) == [
        "llama.cpp on CUDA does not fuse the top-k of 96 experts, but that of 64"
    ]
    assert lines_of(1024, 528)[-1].endswith("of 528 experts, but that of 512 or 576")
    vllm, cuda = lines_of(256, 205)
    assert "vLLM has no fused kernels for 205 experts, but for 208" in vllm
    assert cuda.endswith("of 205 experts, but that of 128")
    (grouped,) = lines_of(256, 128, n_groups=8)
    assert "never fuses the top-k of a router with groups of experts (8 here)" in grouped


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_family_says_which_counts_are_fused(case: Case, tmp_path: Path) -> None:
    source = replace(case.tiny, n_experts=32).write(tmp_path / "model")
    plan = planned(source, tmp_path / "out", keep_experts=24)
    needs = needs_on(plan)
    text = " ".join("\n".join(plan_lines(plan, needs, False)).split())
    found = plan_as_json(plan, needs)["experts"]
    n_groups = plan.model.facts.n_groups
    assert (found["groups"], found["fused_top_k"]) == (n_groups, False)
    if n_groups > 1:
        assert f"never fuses the top-k of a router with groups of experts ({n_groups}" in text
    else:
        assert "does not fuse the top-k of 24 experts, but that of 16" in text
    half = planned(source, tmp_path / "out", keep_experts=16)
    assert plan_as_json(half, needs_on(half))["experts"]["fused_top_k"] is (n_groups == 1)


TOKENS = {0: (0, 5, 300), 1: (100, 99, 7)}
LINES = ("experts: fewest tokens 0, median 9 tokens per expert", "warning: few tokens")


def test_the_tokens_of_experts_are_in_the_plan(tmp_path: Path) -> None:
    plan = planned(TinyQwen3Moe().write(tmp_path / "model"), tmp_path / "out", compression=0.5)
    needs = needs_on(plan)
    assert "fewest" not in "\n".join(plan_lines(plan, needs, with_tensors=True))
    assert plan_as_json(plan, needs)["coverage"] == {"observations": None, "imatrix": None}
    known = KnownCoverage(None, LINES, importance_record(TOKENS))
    needs = replace(needs, reused=replace(needs.reused, coverage=known))
    text = "\n".join(plan_lines(plan, needs))
    assert "  observed experts: fewest tokens 0, median 9 tokens per expert\n" in text
    assert "  warning: few tokens\n" in text
    assert " ".join(text.split()).count("importance matrix: fewest tokens 0, median 53") == 1
    assert "tokens of the importance matrix per expert:" not in text
    longer = "\n".join(plan_lines(plan, needs, with_tensors=True))
    rows = [line.split() for line in longer.splitlines() if line.endswith("   ffn_down_exps")]
    assert rows == [
        ["0", "3", "1", "2", "66.67%", "0", "5", "ffn_down_exps"],
        ["1", "3", "0", "2", "66.67%", "7", "99", "ffn_down_exps"],
    ]
    values = plan_as_json(plan, needs)["coverage"]["imatrix"]
    assert (values["n_unseen"], values["n_few"], values["tokens"]) == (1, 4, TOKENS)
    # a build says it by itself
    assert "fewest" not in "\n".join(up_to_date_or_lines(plan, needs))
