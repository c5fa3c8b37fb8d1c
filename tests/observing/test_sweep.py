"""The sweep against transformers' own model and REAP's formula written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reap2gguf.artifacts.observations import LayerObservation
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, ObservationError, UsageError
from reap2gguf.gguf_files.imatrix import ImatrixEntry
from reap2gguf.models import describe
from reap2gguf.observing import sizes
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.loader import WeightLoader
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.spool import DeviceSpool
from reap2gguf.observing.sweep import SweepOptions, SweepReport, sweep
from reap2gguf.progress import Silent
from tests.tiny import TinyQwen3Moe

CPU = SweepOptions(device="cpu", dtype="float32")


def rows_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 4000, length) for length in lengths]


def observe(folder: Path, rows: list[np.ndarray]) -> tuple[SaliencyObserver, SweepReport]:
    checkpoint = Checkpoint.open(folder)
    model = describe(checkpoint)
    observer = SaliencyObserver(model)
    report = sweep(checkpoint, model, rows, observer, CPU, "test", Silent())
    return observer, report


def importance(folder: Path, rows: list[np.ndarray]) -> dict[str, ImatrixEntry]:
    checkpoint = Checkpoint.open(folder)
    model = describe(checkpoint)
    observer = ImportanceObserver(model)
    sweep(checkpoint, model, rows, observer, CPU, "test", Silent())
    return observer.entries


class Witness:
    """Runs transformers' model row by row and keeps what enters its modules."""

    def __init__(self, folder: Path, rows: list[np.ndarray]) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.requires_grad_(False)
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.routing: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(self._keep_input(name))
            elif name.endswith("mlp.gate"):
                module.register_forward_pre_hook(self._keep_input(name))
                module.register_forward_hook(self._keep_routing(name))
        with torch.inference_mode():
            for row in rows:
                self.model(torch.from_numpy(row)[None])

    def _keep_input(self, name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            flat = arguments[0].reshape(-1, arguments[0].shape[-1])
            self.inputs.setdefault(name, []).append(flat)

        return hook

    def _keep_routing(self, name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            _, weights, indices = output
            self.routing.setdefault(name, []).append((weights, indices))

        return hook

    def expert_pairs(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per expert: inputs (S, H), activations (S, F), gate weights (S,)."""
        name = f"model.layers.{layer}.mlp.gate"
        hidden = torch.cat(self.inputs[name])
        weights = torch.cat([w for w, _ in self.routing[name]])
        indices = torch.cat([i for _, i in self.routing[name]])
        experts = self.model.model.layers[layer].mlp.experts
        found = []
        for expert in range(experts.num_experts):
            token, place = torch.where(indices == expert)
            gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
            activations = torch.nn.functional.silu(gate) * up
            found.append((hidden[token], activations, weights[token, place]))
        return found

    def saliency(self, layer: int) -> LayerObservation:
        """The sums of arXiv 2510.13999, expert by expert."""
        down = self.model.model.layers[layer].mlp.experts.down_proj
        sums = []
        for expert, (_, activations, gates) in enumerate(self.expert_pairs(layer)):
            norms = (activations @ down[expert].T).norm(dim=-1).double()
            gates = gates.double()
            peak = norms.max().item() if len(norms) else 0.0
            sums.append((len(norms), (gates * norms).sum(), gates.sum(), norms.sum(), peak))
        columns = zip(*sums, strict=True)
        count, reap, gate, norm, peak = (np.array([float(v) for v in c]) for c in columns)
        return LayerObservation(count.astype(np.int64), reap, gate, norm, peak)


LAYOUTS = {
    "2d": TinyQwen3Moe(),
    "3d": TinyQwen3Moe(fused=True, tied=True),
    "dense layer": TinyQwen3Moe(n_layers=3, dense_layers=(1,)),
    "num_local_experts": TinyQwen3Moe(count_key="num_local_experts", n_shards=3),
    "float32": TinyQwen3Moe(dtype=torch.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saliency_is_reaps_formula(layout: str, tmp_path: Path) -> None:
    spec = LAYOUTS[layout]
    folder = spec.write(tmp_path / "model")
    rows = rows_of(40, 40, 23, 7)
    observer, report = observe(folder, rows)
    assert (report.n_rows, report.n_tokens, report.n_dropped_rows) == (4, 110, 0)
    witness = Witness(folder, rows)
    assert set(observer.layers) == set(range(spec.n_layers)) - set(spec.dense_layers)
    for layer, seen in observer.layers.items():
        expected = witness.saliency(layer)
        np.testing.assert_array_equal(seen.count, expected.count)
        assert seen.count.sum() == 110 * spec.top_k
        for name in ("reap_sum", "gate_sum", "norm_sum", "norm_max"):
            np.testing.assert_allclose(
                getattr(seen, name), getattr(expected, name), rtol=2e-5, atol=1e-9
            )


@pytest.mark.parametrize("layout", ["2d", "3d", "dense layer"])
def test_importance_is_the_sum_of_squared_inputs(layout: str, tmp_path: Path) -> None:
    spec = LAYOUTS[layout]
    folder = spec.write(tmp_path / "model")
    rows = rows_of(32, 32, 19)
    entries = importance(folder, rows)
    witness = Witness(folder, rows)
    dense = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    expected: dict[str, tuple[torch.Tensor, list[int]]] = {}
    for layer in range(spec.n_layers):
        for gguf_name, path in dense.items():
            if seen := witness.inputs.get(f"model.layers.{layer}.{path}"):
                values = torch.cat(seen)
                sums = values.double().square().sum(0, keepdim=True)
                expected[f"blk.{layer}.{gguf_name}.weight"] = (sums, [len(values)])
        if layer in spec.dense_layers:
            continue
        pairs = witness.expert_pairs(layer)
        counts = [len(inputs) for inputs, _, _ in pairs]
        by_inputs = torch.stack([i.double().square().sum(0) for i, _, _ in pairs])
        by_activations = torch.stack([a.double().square().sum(0) for _, a, _ in pairs])
        expected[f"blk.{layer}.ffn_gate_exps.weight"] = (by_inputs, counts)
        expected[f"blk.{layer}.ffn_up_exps.weight"] = (by_inputs, counts)
        expected[f"blk.{layer}.ffn_down_exps.weight"] = (by_activations, counts)
    assert set(entries) == set(expected)
    for name, (sums, counts) in expected.items():
        np.testing.assert_array_equal(entries[name].counts, counts, err_msg=name)
        np.testing.assert_allclose(entries[name].sums, sums.numpy(), rtol=2e-5, err_msg=name)


def test_batching_changes_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(30, 12, 30, 5, 21)
    together, _ = observe(tiny, rows)
    monkeypatch.setitem(sizes.MOST_TOKENS, "cpu", 1)
    apart, _ = observe(tiny, rows)
    for layer in together.layers:
        np.testing.assert_array_equal(together.layers[layer].count, apart.layers[layer].count)
        np.testing.assert_allclose(
            together.layers[layer].reap_sum, apart.layers[layer].reap_sum, rtol=1e-5
        )


def test_2d_and_3d_storage_give_the_same_sums(tmp_path: Path) -> None:
    rows = rows_of(33, 20)
    apart, _ = observe(TinyQwen3Moe().write(tmp_path / "2d"), rows)
    fused, _ = observe(TinyQwen3Moe(fused=True).write(tmp_path / "3d"), rows)
    for layer in apart.layers:
        np.testing.assert_array_equal(apart.layers[layer].reap_sum, fused.layers[layer].reap_sum)


def poisoned(tmp_path: Path, token: int) -> Path:
    """A checkpoint in which one token's embedding is not a number."""
    spec = TinyQwen3Moe()
    folder = spec.write(tmp_path / "poisoned")
    tensors = spec.tensors()
    tensors["model.embed_tokens.weight"][token, 3] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("batch_tokens", [8192, 18, 1])
@pytest.mark.parametrize("spool", ["device", "disk"])
def test_a_row_that_is_not_finite_counts_nowhere(
    batch_tokens: int, spool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone in its batch, or among others."""
    monkeypatch.setitem(sizes.MOST_TOKENS, "cpu", batch_tokens)
    rows = [row + 10 for row in rows_of(*[6] * 120)]
    bad = rows[17].copy()
    bad[2] = 5
    folder = poisoned(tmp_path, token=5)
    checkpoint = Checkpoint.open(folder)
    model = describe(checkpoint)
    with_bad = SaliencyObserver(model)
    options = replace(CPU, spool=spool, folder=tmp_path)
    among = [*rows[:17], bad, *rows[17:]]
    report = sweep(checkpoint, model, among, with_bad, options, "test", Silent())
    assert report.n_dropped_rows == 1
    without, _ = observe(folder, rows)
    for layer in without.layers:
        np.testing.assert_array_equal(with_bad.layers[layer].count, without.layers[layer].count)
        np.testing.assert_allclose(
            with_bad.layers[layer].reap_sum, without.layers[layer].reap_sum, rtol=1e-5
        )


def test_too_many_rows_that_are_not_finite_stop_the_sweep(tmp_path: Path) -> None:
    rows = rows_of(8, 8, 8)
    rows[1][0] = 5
    with pytest.raises(ObservationError, match=r"layer 0: 1 of 3 rows are NaN"):
        observe(poisoned(tmp_path, token=5), rows)


def test_a_layer_that_does_not_fit_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = WeightLoader.take

    def take_less(self: WeightLoader, key: str) -> dict[str, torch.Tensor]:
        tensors = take(self, key)
        if key == "layer 1":
            tensors["self_attn.q_proj.weight"] = tensors["self_attn.q_proj.weight"][1:]
        return tensors

    monkeypatch.setattr(WeightLoader, "take", take_less)
    with pytest.raises(CheckpointError, match=r"layer 1 does not fit .*q_proj"):
        observe(tiny, rows_of(8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        SweepOptions(device="cuda").resolve()


def test_bfloat16_stays_near_float32(tiny: Path) -> None:
    rows = rows_of(64)
    exact, _ = observe(tiny, rows)
    checkpoint = Checkpoint.open(tiny)
    model = describe(checkpoint)
    observer = SaliencyObserver(model)
    options = SweepOptions(device="cpu", dtype="bfloat16")
    sweep(checkpoint, model, rows, observer, options, "test", Silent())
    for layer in exact.layers:
        total = exact.layers[layer].reap_sum.sum()
        assert observer.layers[layer].reap_sum.sum() == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("where", ["computing", "loading", "storing"])
def test_a_batch_that_does_not_fit_is_halved(
    where: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(20, 20, 20, 20, 13)
    whole, _ = observe(tiny, rows)
    layers_begun = 0
    run_layer, load, store = StreamedDecoder.run_layer, DeviceSpool.load, DeviceSpool.store

    def check(n_positions: int, here: str) -> None:
        if here == where and layers_begun and n_positions > 40:
            raise torch.OutOfMemoryError("no more")

    def narrow_run(self: StreamedDecoder, index: int, hidden: torch.Tensor) -> torch.Tensor:
        output = run_layer(self, index, hidden)
        check(output[..., 0].numel(), "computing")
        return output

    def narrow_load(self: DeviceSpool, place: Any, following: Any = None) -> torch.Tensor:
        check(place[1] - place[0], "loading")
        return load(self, place, following)

    def narrow_store(self: DeviceSpool, place: Any, hidden: torch.Tensor) -> None:
        check(len(hidden), "storing")
        store(self, place, hidden)

    class Counting(SaliencyObserver):
        def attach(self, index: int, layer: torch.nn.Module) -> None:
            nonlocal layers_begun
            layers_begun += 1
            super().attach(index, layer)

    monkeypatch.setattr(StreamedDecoder, "run_layer", narrow_run)
    monkeypatch.setattr(DeviceSpool, "load", narrow_load)
    monkeypatch.setattr(DeviceSpool, "store", narrow_store)
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    checkpoint = Checkpoint.open(tiny)
    model = describe(checkpoint)
    halved = Counting(model)
    report = sweep(checkpoint, model, rows, halved, CPU, "test", Silent())
    assert report.n_dropped_rows == 0
    assert sum("is halved" in note for note in notes) == 2, "halved in the first layer only"
    for layer in whole.layers:
        np.testing.assert_array_equal(halved.layers[layer].count, whole.layers[layer].count)
        np.testing.assert_allclose(
            halved.layers[layer].reap_sum, whole.layers[layer].reap_sum, rtol=1e-5
        )


def test_one_row_that_does_not_fit_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: StreamedDecoder, index: int, hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(StreamedDecoder, "run_layer", never)
    with pytest.raises(ObservationError, match="too little for one row of 20 tokens"):
        observe(tiny, rows_of(20, 20, 20))


def test_a_spool_on_disk_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    rows = rows_of(40, 40, 23, 7)
    here, _ = observe(tiny, rows)
    checkpoint = Checkpoint.open(tiny)
    model = describe(checkpoint)
    there = SaliencyObserver(model)
    options = replace(CPU, spool="disk", folder=tmp_path)
    sweep(checkpoint, model, rows, there, options, "test", Silent())
    for layer in here.layers:
        np.testing.assert_array_equal(there.layers[layer].reap_sum, here.layers[layer].reap_sum)


def test_too_little_memory_is_said(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    model = describe(checkpoint)
    options = replace(CPU, memory=2**20)
    with pytest.raises(UsageError, match=r"expected at least .* raise --memory by [0-9.]+GiB"):
        sweep(
            checkpoint, model, rows_of(64), SaliencyObserver(model), options, "test", Silent()
        )  # fmt: skip
