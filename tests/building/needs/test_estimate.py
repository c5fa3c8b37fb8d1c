"""What a plan needs, against what a build takes and what a sweep decides."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reap2gguf
from reap2gguf.building import pipeline, text_stage
from reap2gguf.building.needs.amount import Amount
from reap2gguf.building.needs.disk import states_kept
from reap2gguf.building.needs.estimate import ALL, LONG, Estimate, Reused
from reap2gguf.building.needs.rented import GPUS
from reap2gguf.building.needs.room import room_needs
from reap2gguf.building.needs.seconds import STAGES, critical_path
from reap2gguf.building.plan import make_plan
from reap2gguf.errors import CalibrationError, UsageError
from reap2gguf.observing.budget import (
    MOST_OF_TIME,
    Kind,
    copies_experts,
    cpu_memory,
    fit,
    layer_bytes,
    save_seconds,
)
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.probe import mtp_probe
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.verifying.memory import comparing_bytes
from tests.building.builds import PROSE, build, options, refuse_at, stop_before_export
from tests.building.needs.machines import GIB, H100, LAPTOP, laptop, needs_on
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe, child_environment
from tests.tokens import FULL_VOCAB

# what `_guessed` makes of a plan whose texts are on the Hub
LONG_TEXT = Amount(1024, 2**21, 2**21, 0, 2048, 2**23, "at most")


def with_amount(needs: Estimate, amount: Amount) -> Estimate:
    return needs.with_amount(amount)


def test_the_whole_is_the_longest_way_through_its_stages(tiny: Path, tmp_path: Path) -> None:
    needs = needs_on(make_plan(options(tiny, tmp_path / "out", evaluate="always")))
    assert tuple(needs.stages) == STAGES
    shorter = min(needs.stages["prune"], needs.stages["imatrix"])
    assert needs.seconds == pytest.approx(sum(needs.stages.values()) - shorter)
    stages = dict.fromkeys(STAGES, 1.0) | {"prune": 5.0, "imatrix": 20.0, "export": 10.0}
    stages |= dict.fromkeys(("fit", "merge", "repair", "weigh"), 0.0)  # none was asked for
    on_gpu = replace(needs.host, gpu_factor=1.0, cores=16)
    assert critical_path(stages, on_gpu) == 7 + 20
    assert critical_path(stages | {"export": 30.0}, on_gpu) == 7 + 5 + 30
    # a recipe that asks how much the importance matrix saw makes the export wait for all of it
    assert critical_path(stages, on_gpu, waits=True) == 7 + 20 + 10
    assert critical_path(stages, replace(needs.host, cores=2)) == 7 + 20 + 10
    assert critical_path(stages, replace(needs.host, cores=1)) == sum(stages.values())
    assert [name for name, seconds in needs.stages.items() if not seconds] == [
        "weigh",
        "choose",
        "merge",
        "repair",
        "fit",
    ]
    assert needs.fits
    assert not needs.advice


def test_a_disk_that_is_slower_than_the_gpu_sets_the_time(tiny: Path, tmp_path: Path) -> None:
    needs = needs_on(make_plan(options(tiny, tmp_path / "out")), H100)
    quick = needs.stages["observe"]
    n_layers = needs.plan.model.facts.n_blocks
    for depth in (1, n_layers):
        slow = replace(needs, disk=replace(needs.disk, spool=10**12, depth=depth))
        written = 10**12 * n_layers / depth / needs.host.speed.write_bytes
        assert slow.stages["observe"] == pytest.approx(written, rel=0.01)
    held_back = replace(needs, disk=replace(needs.disk, spool=needs.host.page_cache // 20))
    assert held_back.stages["observe"] == quick


def test_what_keeps_all_experts_observes_nothing(tiny: Path, tmp_path: Path) -> None:
    needs = needs_on(make_plan(options(tiny, tmp_path / "out", compression=0.0)))
    assert needs.stages["observe"] == 0
    assert needs.stages["imatrix"] > 0


def test_files_have_the_sizes_that_were_planned(tmp_path: Path) -> None:
    # so large that the allowance for cards is a small part
    model, out = (
        TinyQwen3Moe(hidden=128, width=128, vocab=FULL_VOCAB).write(tmp_path / "model"),
        tmp_path / "out",
    )
    needs = needs_on(make_plan(options(model, out)))
    build(model, out)
    found = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert 0.6 * needs.disk_bytes < found <= needs.disk_bytes


@pytest.mark.slow
def test_memory_and_disk_stay_below_the_plan(tmp_path: Path) -> None:
    """In a process of its own: the tests' own memory does not count."""
    shape = TinyQwen3Moe(hidden=1024, width=1024, n_experts=16)
    arguments = [
        str(shape.write(tmp_path / "model")), "--recipe", "Q4_K_M,Q8_0,BF16", "--device", "cpu",
        "--output", str(tmp_path / "out"), "--samples", "8", "--max-length", "64", "--json",
    ]  # fmt: skip
    found = []
    for command in ("plan", "build"):
        program = [sys.executable, "-m", "reap2gguf", command, *arguments]
        child = subprocess.run(
            program, env=child_environment({}), check=True, capture_output=True, text=True
        )
        found.append(json.loads(child.stdout))
    planned, built = found
    peak = max(stage["peak_bytes"] for stage in built["stages"])
    assert peak <= planned["estimate"]["memory_bytes"] <= 3 * peak


def test_stages_beside_a_pass_count_in_memory(tiny: Path, tmp_path: Path) -> None:
    plan = make_plan(options(tiny, tmp_path / "out"))
    alone, both = needs_on(plan, laptop(cores=1)), needs_on(plan, laptop(cores=2))
    assert both.memory_bytes > alone.memory_bytes >= alone.sweeps.host_bytes
    least = both.sweeps.host_bytes + 1
    assert needs_on(plan, laptop(memory_free_bytes=least)).memory_bytes < both.memory_bytes
    assert not both.gpu_memory_bytes
    on_gpu = make_plan(options(tiny, tmp_path / "out", compute=ComputeOptions("cuda")))
    needs = needs_on(on_gpu, H100)
    assert needs.gpu_memory_bytes > needs.sweeps.device_bytes
    assert needs.memory_bytes > needs.sweeps.host_bytes


def test_a_gpu_verifies_where_it_pays(wide: Path, tmp_path: Path) -> None:
    """`auto` takes a GPU for much work only; types are then made again sooner, in more RAM."""
    plans = {
        device: make_plan(
            options(
                wide,
                tmp_path / "out",
                recipes=("IQ3_S",),
                compression=0.0,
                compute=ComputeOptions(device),
            )
        )
        for device in ("cuda", "auto")
    }
    machine = replace(H100, cores=1)
    needs = {device: needs_on(plan, machine) for device, plan in plans.items()}
    assert needs["cuda"].stages["verify"] < needs["auto"].stages["verify"] / 1.5
    assert needs["cuda"].stages["export"] < needs["auto"].stages["export"]
    sweeps = {device: replace(one.sweeps, host_bytes=0) for device, one in needs.items()}
    held = {device: replace(needs[device], sweeps=sweeps[device]).memory_bytes for device in plans}
    assert (
        held["cuda"] - held["auto"] >= comparing_bytes(1, True) - comparing_bytes(1, False) - 2**26
    )


def test_what_is_done_takes_no_time(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_before_export(tiny, out, monkeypatch)
    plan = make_plan(options(tiny, out))
    needs, whole = needs_on(plan), needs_on(plan, reused=Reused())
    assert needs.reused.stages == ("texts", "observe", "prune", "imatrix")
    nothing = [name for name, seconds in needs.stages.items() if not seconds]
    # the method was named, and so little text is not measured
    others = {"weigh", "choose", "merge", "repair", "fit", "evaluate"}
    assert set(nothing) == {*needs.reused.stages, *others}
    assert needs.seconds < whole.seconds
    assert needs.reused.written_bytes > plan.hf_bytes
    build(tiny, out)
    assert set(ALL) - set(needs_on(plan).reused.stages) == {"fit"}, "no size was asked for"
    assert needs_on(plan).reused.is_up_to_date
    other = make_plan(options(tiny, out, compression=0.5))
    assert needs_on(other).reused.stages == ("texts", "observe")
    fresh = make_plan(options(tiny, out, fresh=True))
    assert needs_on(fresh).reused.stages == ()


def test_rows_and_tokens_of_small_texts_are_counted(tmp_path: Path, tiny: Path) -> None:
    plan = make_plan(options(tiny, tmp_path / "out", calibration=CalibrationOptions()))
    amount = needs_on(plan).amount
    assert amount.known == "exactly"
    assert amount.n_rows < 1024
    assert amount.longest_row <= plan.max_length
    texts = needs_on(plan).reused.texts
    assert texts is not None
    assert amount.n_tokens == sum(map(len, texts.rows.rows))
    assert amount.n_chunk_tokens == sum(map(len, texts.chunks.chunks))


def test_small_texts_that_are_too_short_are_refused_by_the_plan(tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    plan = make_plan(options(tiny, tmp_path / "out", calibration=CalibrationOptions(str(text))))
    with pytest.raises(CalibrationError, match="do not fill one row"):
        needs_on(plan)


def test_rows_and_tokens_of_large_texts_are_about_right(tmp_path: Path, tiny: Path) -> None:
    line = "The quick brown fox jumps over the lazy dog near the river bank today.\n"
    text = tmp_path / "large.txt"
    text.write_text(line * 20_000)
    calibration = CalibrationOptions(str(text), samples=100, max_length=256)
    amount = needs_on(make_plan(options(tiny, tmp_path, calibration=calibration))).amount
    assert (amount.known, amount.n_rows, amount.n_tokens) == ("about", 100, 25_600)


def test_of_datasets_on_the_hub_only_the_request_is_known(tmp_path: Path, tiny: Path) -> None:
    calibration = CalibrationOptions("owner/name:30,owner/other:10", max_length=128)
    plan = make_plan(options(tiny, tmp_path / "out", calibration=calibration))
    amount = needs_on(plan).amount
    assert (amount.known, amount.n_rows, amount.n_tokens) == ("at most", 40, 40 * 128)


def test_hidden_states_that_do_not_fit_wait_on_the_disk(tmp_path: Path, tiny: Path) -> None:
    plan = make_plan(options(tiny, tmp_path / "out"))
    rows = replace(LONG_TEXT, n_rows=2**16, n_tokens=2**27)
    needs = with_amount(needs_on(plan), rows)
    assert needs.sweeps.hidden_bytes == 2**27 * 64 * 4 == 32 * GIB
    assert needs.hidden_where == "disk"
    assert needs.mentions_hidden
    assert needs.disk.room_bytes > 32 * GIB
    assert needs.sweeps.host_bytes < 22 * GIB
    roomy = with_amount(needs_on(plan, laptop(memory_free_bytes=200 * GIB)), rows)
    assert roomy.hidden_where == "device"
    assert roomy.disk.room_bytes < GIB + 16 * 2**27
    on_gpu = with_amount(needs_on(plan, H100), rows)
    assert on_gpu.hidden_where == "device"
    assert on_gpu.sweeps.hidden_bytes == 16 * GIB  # bfloat16


@pytest.mark.parametrize("shape", [TinyQwen3Moe(), TinyQwen35Moe()], ids=["qwen3", "qwen3.5"])
def test_a_plan_decides_like_the_sweep(shape: TinyQwen3Moe | TinyQwen35Moe, tmp_path: Path) -> None:
    """The same rows, by headers alone and by the decoder that computes."""
    plan = make_plan(options(shape.write(tmp_path / "model"), tmp_path / "out"))
    needs = needs_on(plan)
    texts = needs.reused.texts
    assert texts is not None
    memory = cpu_memory(LAPTOP.memory_free_bytes, None, 0)
    with plan.checkpoint:
        decoder = StreamedDecoder(
            plan.checkpoint, plan.model, torch.float32, torch.device("cpu"), 1
        )
        with closing(decoder):
            layers = {n: decoder.layer_bytes(n) for n in range(plan.model.facts.n_blocks)}
            kind = Kind(
                plan.model,
                4,
                False,
                decoder.has_linear_attention,
                plan.options.compute.threads,
                ImportanceObserver(plan.model).held_bytes(),
                copies_experts(plan.model, decoder.tensors, 4, False),
            )
            rows = [*texts.rows.rows, *mtp_probe(plan.model, texts.rows)]
            need = kind.need(
                layers, decoder.embedding_bytes(), sum(map(len, rows)), max(map(len, rows))
            )
    found = layer_bytes(plan.model, plan.checkpoint.tensors, 4, False)
    assert found == pytest.approx(layers, rel=0.001)  # some values stay float32 in any type
    assert needs.sweeps.budget == fit(need, "cpu", memory, "auto")


def test_a_repair_takes_memory_of_its_own(tmp_path: Path, tiny: Path) -> None:
    rows = CalibrationOptions(str(PROSE), samples=16, max_length=128)
    unrepaired, *plans = (
        make_plan(options(tiny, tmp_path / kind, calibration=rows, repair=kind))
        for kind in ("none", "ridge", "scale")
    )
    plain = needs_on(unrepaired)
    ridge, scale = (needs_on(plan) for plan in plans)
    assert plain.repairing is None
    assert ridge.repairing is not None
    assert scale.repairing is not None
    assert ridge.repairing.host_bytes > scale.repairing.host_bytes
    assert ridge.repairing.hidden_bytes == 3 * plain.sweeps.hidden_bytes
    assert ridge.memory_bytes >= ridge.repairing.host_bytes
    on_gpu = needs_on(plans[0], H100)
    assert on_gpu.repairing is not None
    assert on_gpu.gpu_memory_bytes >= on_gpu.repairing.device_bytes > 0


def test_a_repair_that_does_not_fit_is_a_problem(tmp_path: Path, tiny: Path) -> None:
    rows = CalibrationOptions(str(PROSE), samples=16, max_length=128)
    needs = needs_on(make_plan(options(tiny, tmp_path / "out", calibration=rows, repair="ridge")))
    assert needs.fits
    assert needs.repairing is not None
    refused = replace(needs, repairing=replace(needs.repairing, budget=None, problem="no room"))
    assert refused.problems == ["no room; or pass --repair scale, or none"]


def test_a_limit_of_memory_that_is_too_small_is_a_problem(tmp_path: Path, tiny: Path) -> None:
    compute = ComputeOptions(device="cpu", memory=2**23)
    needs = needs_on(make_plan(options(tiny, tmp_path / "out", compute=compute)))
    assert not needs.fits
    (problem,) = needs.problems
    assert problem.startswith("--memory 8 MiB is too small; this model needs at least 0.")


def test_shorter_rows_are_advised_where_they_fit(tmp_path: Path, tiny: Path) -> None:
    machine = laptop(memory_free_bytes=600 * 2**20)
    needs = needs_on(make_plan(options(tiny, tmp_path / "out")), machine)
    long = with_amount(needs, replace(needs.amount, longest_row=2**16))
    assert not long.fits
    (advice,) = long.advice
    length = int(advice.removeprefix("--max-length ").removesuffix(" fits"))
    assert not with_amount(needs, replace(needs.amount, longest_row=length)).sweeps.problem


def test_a_disk_that_is_too_full_is_a_problem(tmp_path: Path, tiny: Path) -> None:
    plan = make_plan(options(tiny, tmp_path / "out"))
    needs = needs_on(plan, laptop(disk_free_bytes=1000))
    assert needs.lacks_disk
    assert "not enough disk" in needs.problems[0]
    assert "1000 bytes are free" in needs.problems[0]
    # states are not saved where there is no space for them
    assert needs.peak_bytes == needs.disk.room_bytes


def test_the_cache_of_the_hub_has_a_disk_too(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(options(tiny, tmp_path / "out"))
    monkeypatch.setattr(type(plan.checkpoint), "unfetched_bytes", 90 * GIB)
    (problem,) = needs_on(plan).problems
    assert "are needed with the weights from the Hub" in problem
    (problem,) = needs_on(plan, laptop(is_one_disk=False)).problems
    assert problem.startswith("not enough disk for the Hub's cache: 90.00 GiB of weights")
    assert needs_on(plan, laptop(is_one_disk=False, cache_free_bytes=91 * GIB)).fits


def test_a_gpu_that_is_not_here(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ComputeOptions(device="cuda")
    plan = make_plan(options(tiny, tmp_path / "out", compute=compute))
    needs = needs_on(plan, laptop(device="cuda"))
    assert needs.problems == ["--device cuda: there is no GPU here; the figures are for an H100"]
    assert needs.machine.gpu is not None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refuse_at(monkeypatch, text_stage, "read_texts")
    with pytest.raises(UsageError, match="torch sees no CUDA device"):
        pipeline.build(plan, Silent())
    assert not (tmp_path / "out").exists()


def test_fewer_rows_are_advised_where_it_takes_long(tmp_path: Path) -> None:
    source = TinyQwen3Moe(hidden=256, width=256).write(tmp_path / "model")
    needs = needs_on(make_plan(options(source, tmp_path / "out")))
    long = with_amount(needs, replace(LONG_TEXT, n_tokens=2**33, n_chunk_tokens=2**33))
    assert long.seconds > LONG
    (advice,) = long.advice
    n_rows = int(advice.split()[1].removesuffix(":"))
    fewer = with_amount(needs, long.amount.scaled(n_rows))
    assert fewer.seconds < long.seconds
    assert fewer.amount.n_rows == n_rows


@pytest.mark.parametrize("gpu", GPUS)
def test_rented_machines(tmp_path: Path, tiny: Path, gpu: str) -> None:
    plan = make_plan(options(tiny, tmp_path / "out"))
    needs = reap2gguf.estimate(plan, gpu=gpu)
    assert needs.machine.device == "cuda"
    assert needs.fits
    assert needs.stages == needs_on(plan).rented(gpu).stages
    assert not needs.reused.stages


def test_a_slower_gpu_takes_longer(tmp_path: Path, tiny: Path) -> None:
    needs = with_amount(needs_on(make_plan(options(tiny, tmp_path / "out"))), LONG_TEXT)
    seconds = {gpu: needs.rented(gpu).stages["observe"] for gpu in GPUS}
    assert seconds["L4"] > seconds["L40S"] > seconds["A100-80GB"] > seconds["H100"]
    assert seconds["H100"] > seconds["H200"]
    with pytest.raises(UsageError, match="no figures for a GPU 'K80'; there are some of L4"):
        needs.rented("K80")


def test_the_room_of_a_build_is_at_least_what_the_plan_says(tmp_path: Path) -> None:
    source = TinyQwen35Moe().write(tmp_path / "model")
    for changes in ({}, {"compute": ComputeOptions("cpu", spool="disk")}, {"compression": 0.0}):
        plan = make_plan(options(source, tmp_path / "out", **changes))
        assert room_needs(plan).room_bytes >= needs_on(plan).disk.room_bytes


@pytest.mark.parametrize(
    ("seconds", "n_layers", "kept"),
    [(0.0, 4, 0), (0.5, 4, 0), (8.0, 4, 1), (1000.0, 4, 2), (1000.0, 1, 0), (1000.0, 2, 1)],
)
def test_states_that_a_pass_keeps(seconds: float, n_layers: int, kept: int) -> None:
    assert 2.0 < save_seconds(2**26) / MOST_OF_TIME < 4.0
    assert states_kept(seconds, n_layers, 2**26) == kept


def test_a_model_that_is_here_needs_no_download(tmp_path: Path, tiny: Path) -> None:
    plan = make_plan(options(tiny, tmp_path / "out"))
    before = needs_on(plan).stages["observe"]
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert needs_on(plan, LAPTOP).stages["observe"] == before
