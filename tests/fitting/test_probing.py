"""How much an error in each kind of tensor counts, measured: beside files that `evaluate` reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.building.plan import make_plan
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.figures import divergence
from reap2gguf.evaluating.variants import Variant
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting import probing
from reap2gguf.fitting.errors_table import Cache, Where, measure
from reap2gguf.fitting.fitted import Problem
from reap2gguf.fitting.probe_text import probe_text
from reap2gguf.fitting.probing import ProbedText, Probing, probes_of
from reap2gguf.fitting.sensitivity import sensitivities
from reap2gguf.gguf_files.imatrix import load_imatrix, save_gguf
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.quantizing.quantizer import load_quantizer
from tests.building.builds import build, options
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.quantized import as_mxfp4
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

CPU = ComputeOptions(device="cpu", threads=2)


@dataclass(frozen=True)
class Parts:
    model: Path
    imatrix: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("probing")
    model = TinyQwen3Moe().write(folder / "tiny")
    save_gguf(random_imatrix(gguf_tensors(model)), folder / "i.gguf")
    return Parts(model, folder / "i.gguf")


def test_a_probe_for_each_kind_in_each_band_of_layers(tmp_path: Path) -> None:
    model = TinyQwen35Moe().write(tmp_path / "tiny")
    with Checkpoint.open(model) as checkpoint:
        described = describe(checkpoint)
    tensors = described.gguf_tensors(checkpoint.tensors)
    facts = described.facts
    problem = Problem(tensors, facts, facts.n_experts, {tensor.name for tensor in tensors})
    probes = probes_of(problem, facts)
    names = [name for probe in probes for name in probe.types]
    assert len({*names}) == len(names)
    trunk = {
        tensor.name
        for tensor in problem.to_measure()
        if not tensor.name.startswith(f"blk.{facts.n_layers}.")
    }
    assert {*names} == trunk  # an MTP block takes no part in the answers
    for probe in probes:
        assert len({probing.kind_of(name) for name in probe.types}) == 1


def test_what_was_kept_of_a_probe_is_not_that_of_one_with_fewer_tensors(tmp_path: Path) -> None:
    """Tensors with types of their own are no choice: the same kind has fewer tensors then."""
    model = TinyQwen3Moe(n_layers=8).write(tmp_path / "tiny")
    with Checkpoint.open(model) as checkpoint:
        described = describe(checkpoint)
        tensors = described.gguf_tensors(checkpoint.tensors)
    facts, weighted = described.facts, {tensor.name for tensor in tensors}
    whole = Problem(tensors, facts, facts.n_experts, weighted)
    fewer = replace(whole, fixed={"blk.0.ffn_up_exps.weight": Type.Q8_0})
    named = [{one.name: {*one.types} for one in probes_of(p, facts)} for p in (whole, fewer)]
    assert {*named[0]} - {*named[1]} == {"ffn_up_exps.weight in layers [01]"}
    assert {*named[1]} - {*named[0]} == {"ffn_up_exps.weight in layers 1"}
    for name in {*named[0]} & {*named[1]}:
        assert named[0][name] == named[1][name]


def test_no_probe_for_what_only_stays_as_it_is_stored(tmp_path: Path) -> None:
    """Experts in MXFP4 whose rows fill no smaller blocks lose nothing."""
    with Checkpoint.open(as_mxfp4(GPT_OSS).write(tmp_path / "tiny")) as checkpoint:
        described = describe(checkpoint)
        tensors = described.gguf_tensors(checkpoint.tensors)
    facts = described.facts
    problem = Problem(tensors, facts, facts.n_experts, {tensor.name for tensor in tensors})
    names = {name for probe in probes_of(problem, facts) for name in probe.types}
    measured = {tensor.name for tensor in problem.to_measure()}
    assert names == {name for name in measured if "_exps" not in name} < measured


def test_weights_are_divergences_over_errors(parts: Parts, tmp_path: Path) -> None:
    with Checkpoint.open(parts.model) as checkpoint:
        model = describe(checkpoint)
        facts, imatrix = model.facts, load_imatrix(parts.imatrix)
        tensors = model.gguf_tensors(checkpoint.tensors)
        problem = Problem(tensors, facts, facts.n_experts, imatrix.entries)
        probes = probes_of(problem, facts)
        host = BlockMaker(checkpoint, load_quantizer(0), imatrix.entries)
        types = [*{one for probe in probes for one in probe.types.values()}]
        errors = measure(host, problem.free, types, Where("cpu", 2), Silent(), {})
        text = probe_text(parts.model, facts)
        calls = []

        def evaluate(variants: Any, pairs: Any) -> Any:
            calls.append(len(variants))
            return evaluate_variants(variants, text.rows, pairs, CPU, Silent())

        made = Probing(
            checkpoint,
            model,
            imatrix,
            ProbedText(text.sha256, evaluate),
            Cache(tmp_path / "s.json", "key"),
        )
        weights = made.sensitivities(problem, errors, Silent())
        assert calls == [1 + len(probes)]
        assert made.sensitivities(problem, errors, Silent()) == weights
        assert len(calls) == 1  # it was kept
    probe = next(one for one in probes if "ffn_down_exps" in one.name)
    # the same model as a GGUF file, whose other tensors are BF16
    (kind,) = {one.name for one in probe.types.values()}
    file = tmp_path / "one.gguf"
    reap2gguf.quantize(
        parts.model,
        "bf16",
        file,
        imatrix=parts.imatrix,
        tensor_types=[f"{name}={kind}" for name in probe.types],
    )
    with Checkpoint.open(parts.model) as checkpoint:
        written = GgufWeights(read_whole_header(file), model, checkpoint.tensors)
        variants = [
            Variant("source", "source", checkpoint, model, 0, 16.0),
            Variant("file", "gguf", written, written.model, 0, 16.0),
        ]
        scores = evaluate_variants(variants, text.rows, [("source", "file")], CPU, Silent())
    mean = divergence(scores.pair("source", "file")).mean.value
    lost = sum(errors[name][kind] for name in probe.types)
    for name in probe.types:
        assert weights[name] == pytest.approx(mean / lost, rel=1e-3)
    fixed = sensitivities(tensor.name for tensor in problem.free)
    assert weights.keys() == fixed.keys()
    assert weights != fixed


def test_recipes_fit_measures_once_and_says_which_ways_there_are(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"imatrix": parts.imatrix, "device": "cpu", "threads": 2}
    table = reap2gguf.fit_recipe(
        parts.model, tmp_path / "t.toml", target_bpw=7.0, sensitivity="table", **given
    )
    given["sensitivity"] = "measured"
    found = reap2gguf.fit_recipe(parts.model, tmp_path / "a.toml", target_bpw=7.0, **given)
    assert found.bits_per_weight <= 7.0
    assert found.tensor_types != table.tensor_types
    kept = tmp_path / "tiny.sensitivities.json"
    assert kept.is_file()
    monkeypatch.setattr(Probing, "_measured", lambda *_: pytest.fail("measured again"))
    again = reap2gguf.fit_recipe(parts.model, tmp_path / "b.toml", target_bpw=7.0, **given)
    assert again.tensor_types == found.tensor_types
    with pytest.raises(UsageError, match="sensitivity is 'felt', expected one of table, measured"):
        reap2gguf.fit_recipe(
            parts.model, tmp_path / "c.toml", target_bpw=7.0, **{**given, "sensitivity": "felt"}
        )


def test_a_build_measures_the_pruned_model(parts: Parts, tmp_path: Path) -> None:
    asked = {"recipes": (), "target_bpw": 7.0, "sensitivity": "measured"}
    plan = make_plan(options(parts.model, tmp_path / "out", **asked))
    assert plan.sized is not None
    assert plan.sized.n_probes > 8
    by_table = make_plan(
        options(parts.model, tmp_path / "out", **{**asked, "sensitivity": "table"})
    )
    assert estimate(plan).stages["fit"] > estimate(by_table).stages["fit"]
    made = build(parts.model, tmp_path / "out", **asked)
    assert made.hf_folder is not None
    found = reap2gguf.fit_recipe(
        made.hf_folder,
        tmp_path / "x.toml",
        imatrix=made.gguf_folder / "imatrix.gguf",
        target_bpw=7.0,
        sensitivity="measured",
        device="cpu",
    )
    assert found.tensor_types == dict(made.manifest.gguf[0].tensors)
    assert not build(parts.model, tmp_path / "out", **asked).stages
    # another target of the finished bundle reads what was measured
    more = build(parts.model, tmp_path / "out", **{**asked, "target_bpw": 8.0})
    assert [stage.name for stage in more.stages] == ["export", "verify"]
    assert len([*(tmp_path / "out" / ".work" / "sensitivities").iterdir()]) == 1
