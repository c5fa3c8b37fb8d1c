"""What lies beside a manifest, and what tensors are for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reap2gguf.api.inspecting import observations_of as find_observations
from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.evaluation import Comparison
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.reporting.facts import in_layer, layer_of, read_facts, role_of
from tests.conftest import Bundle
from tests.evaluations import EXAMPLE, Q4, divergence_of
from tests.reports import facts_of, observations_of


def test_a_finished_bundle_has_all_facts(built: Bundle) -> None:
    manifest = Manifest.load(built.hf)
    found = [
        read_facts(manifest, folder, find_observations(manifest, folder))
        for folder in (built.hf, built.gguf)
    ]
    for facts in found:
        assert facts.observations is not None
        assert facts.sizes.keys() == {record.file for record in manifest.gguf}
        for record in manifest.gguf:
            header = read_gguf_header(built.gguf / record.file)
            for name, info in header.tensors.items():
                size = facts.sizes[record.file][name]
                assert (size.n_weights, size.n_bytes) == (np.prod(info.shape), info.n_bytes)
        entries = load_imatrix(built.gguf / "imatrix.gguf").entries
        for layer, counts in facts.used_after.items():
            assert counts.tolist() == entries[f"blk.{layer}.ffn_down_exps.weight"].counts.tolist()
        assert facts.used_after.keys() == manifest.pruning.kept.keys()
        assert facts.hashes[manifest.gguf[0].file]


def test_the_kept_experts_have_the_highest_scores(built: Bundle) -> None:
    manifest = Manifest.load(built.hf)
    facts = read_facts(manifest, built.hf, find_observations(manifest, built.hf))
    for layer, scores in facts.scores().items():
        kept = list(manifest.pruning.kept[layer])
        assert scores[kept].min() >= np.delete(scores, kept).max()


def test_a_lone_download_has_fewer(bundle: Bundle) -> None:
    manifest = Manifest.load(bundle.gguf)
    first, second = manifest.gguf
    (bundle.gguf / second.file).unlink()
    for name in ("imatrix.gguf", "observations.safetensors", "SHA256SUMS"):
        (bundle.gguf / name).unlink()
    facts = read_facts(manifest, bundle.gguf, find_observations(manifest, bundle.gguf))
    assert list(facts.sizes) == [first.file]
    assert (facts.observations, facts.used_after, facts.hashes) == (None, {}, {})


def test_observations_in_the_bundle_are_found(built: Bundle, bundle: Bundle) -> None:
    (path,) = (built.output / ".work" / "observations").iterdir()
    (bundle.gguf / "observations.safetensors").write_bytes(path.read_bytes())
    manifest = Manifest.load(bundle.hf)
    for folder in (bundle.hf, bundle.gguf):
        found = find_observations(manifest, folder)
        assert found is not None
        assert found.layers.keys() == manifest.pruning.kept.keys()


def test_files_of_another_bundle_are_refused(bundle: Bundle) -> None:
    manifest = Manifest.load(bundle.gguf)
    first = manifest.gguf[0]
    types = {**first.tensors, "token_embd.weight": "Q2_K"}
    changed = replace(manifest, gguf=(replace(first, tensors=types),))
    with pytest.raises(ArtifactError, match="its tensors are not those that"):
        read_facts(changed, bundle.gguf, None)
    fewer = replace(manifest, pruning=replace(manifest.pruning, n_kept=11))
    with pytest.raises(ArtifactError, match="has 12 experts, expected 11"):
        read_facts(fewer, bundle.gguf, None)


def test_observations_of_another_model_are_refused() -> None:
    facts = facts_of()
    other: Observations = observations_of(4, 8)
    with pytest.raises(ArtifactError, match="layer 0 of the observations does not have the 16"):
        replace(facts, observations=other).scores()


def test_damages_are_told_apart() -> None:
    facts = facts_of()
    assert [facts.damage(one) for one in EXAMPLE.comparisons] == [
        "pruning", "quantizing", "both", "quantizing", "both",
    ]  # fmt: skip
    pruning = replace(facts.manifest.pruning, n_kept=16)
    whole = replace(facts, manifest=replace(facts.manifest, pruning=pruning))
    assert whole.damage(Comparison("source", Q4, divergence_of(0.1))) == "quantizing"
    assert facts.label(Q4) == "Q4_K_M"
    assert facts.label("source") == "source"


@pytest.mark.parametrize(
    ("tensor", "role"),
    [
        ("blk.3.ffn_down_exps.weight", "experts, down"),
        ("blk.3.ffn_gate_exps.weight", "experts, gate and up"),
        ("blk.3.ffn_gate_shexp.weight", "shared expert"),
        ("blk.3.ffn_gate_inp_shexp.weight", "shared expert"),
        ("blk.3.ffn_gate_inp.weight", "router"),
        ("blk.3.attn_q_norm.weight", "norms"),
        ("blk.3.attn_qkv.weight", "linear attention, Mamba"),
        ("blk.3.ssm_conv1d.weight", "linear attention, Mamba"),
        ("blk.3.shortconv.conv.weight", "convolution"),
        ("blk.0.ffn_gate.weight", "dense layers"),
        ("blk.3.exp_probs_b.bias", "router"),
        ("blk.3.attn_output.weight", "attention"),
        ("blk.48.nextn.eh_proj.weight", "MTP block"),
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norms"),
        ("strange.thing", "other"),
    ],
)
def test_roles(tensor: str, role: str) -> None:
    assert role_of(tensor) == role


def test_layers_of_names() -> None:
    assert layer_of("blk.12.a.b.weight") == 12
    for name in ("token_embd.weight", "blk.x.a", "blk.\u0663.a", "blk.1", "blk.999999.a"):
        assert layer_of(name) == -1
    assert in_layer("blk.12.a.b.weight") == "a.b"
    assert in_layer("output.weight") == "output"
