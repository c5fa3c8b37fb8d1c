"""A plan on a terminal of 80 by 24, and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from reap2gguf.building.needs.amount import Amount
from reap2gguf.building.needs.estimate import Estimate
from reap2gguf.building.needs.rented import GPUS
from reap2gguf.building.plan import Plan, make_plan
from reap2gguf.cli import cli
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.plan_views import plan_lines, up_to_date_or_lines
from tests.building.builds import build, options
from tests.building.needs.machines import GIB, H100, LAPTOP, laptop, needs_on
from tests.tiny import EXAMPLE, TinyQwen35Moe

CPU = ComputeOptions(device="cpu")


def planned(output: Path, **changes: Any) -> Plan:
    values: dict[str, Any] = {"recipes": ("unsloth-iq4km", "q8_0"), "model": str(EXAMPLE)}
    return make_plan(BuildOptions(output=output, **values | changes))


def text_of(needs: Estimate, with_tensors: bool = False) -> str:
    return "\n".join(plan_lines(needs.plan, needs, with_tensors))


def one_line(needs: Estimate, title: str) -> str:
    """The line of a title, with those that it was wrapped into."""
    lines = text_of(needs).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(f"  {title}: "))
    found = [lines[first]]
    for line in lines[first + 1 :]:
        if not line.startswith("    "):
            break
        found.append(line)
    return " ".join(line.strip() for line in found).removeprefix(f"{title}: ")


def test_a_plan_of_two_recipes_fits_a_terminal(tmp_path: Path) -> None:
    source = TinyQwen35Moe(hidden=256, width=256, n_experts=64).write(tmp_path / "model")
    plan = planned(tmp_path / "out", model=str(source))
    lines = text_of(needs_on(plan)).splitlines()
    after_notes = next(n for n, line in enumerate(lines) if "_5MoeFor" in line)
    assert len(lines) - after_notes <= 22
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1].startswith("  time: about ")
    assert lines[0].endswith(f"-> {plan.name}")


def test_tensors_are_grouped_by_type(tmp_path: Path) -> None:
    needs = needs_on(planned(tmp_path / "out"))
    short, long = text_of(needs), text_of(needs, with_tensors=True)
    assert "bits per weight: Q4_K x 22, Q5_K x 4, Q6_K x 2, Q8_0 x 1" in " ".join(short.split())
    assert "blk.*.ffn_down_exps.weight" not in short
    assert "blk.*.ffn_down_exps.weight" in long
    assert "rule " in long


def test_the_default_mix_is_counted_and_called_small(tmp_path: Path) -> None:
    assert one_line(needs_on(planned(tmp_path / "out")), "calibration") == (
        "default, 58 rows, 77 k tokens (small: for a release use seed-000 or your own)"
    )
    mix = planned(tmp_path / "out", calibration=CalibrationOptions("seed-000"))
    found = one_line(needs_on(mix), "calibration")
    assert found.startswith("seed-000, up to 1,000 rows, ")
    assert "small" not in found


def test_what_the_machine_is(tmp_path: Path) -> None:
    plan = planned(tmp_path / "out")
    assert one_line(needs_on(plan), "runs on") == (
        "CPU (2 cores, no GPU found); 22 GiB of RAM free"
    )
    asked = planned(tmp_path / "out", compute=CPU)
    assert "CPU (1 core, as --device says)" in one_line(needs_on(asked, laptop(cores=1)), "runs on")
    assert one_line(needs_on(plan, H100), "runs on").startswith(
        "NVIDIA H100 80GB HBM3 (78 GiB of 79 GiB free), 2 cores; "
    )
    nowhere = needs_on(plan, laptop(device="cuda"))
    assert one_line(nowhere, "runs on").startswith("no GPU here: figures are for an H100")


def test_where_hidden_states_wait(tmp_path: Path) -> None:
    plan = planned(tmp_path / "out")
    assert "hidden states" not in text_of(needs_on(plan))
    rows = Amount(2**14, 2**25, 2**20, 0, 2048, 2**20, "at most")
    large = needs_on(plan).with_amount(rows)
    assert one_line(large, "memory").endswith("; hidden states (32 GiB) wait on disk")
    roomy = needs_on(plan, laptop(memory_free_bytes=100 * GIB)).with_amount(rows)
    assert one_line(roomy, "memory").endswith("wait in RAM")
    on_gpu = needs_on(plan, H100).with_amount(rows)
    assert one_line(on_gpu, "memory").endswith("hidden states (16 GiB) wait in GPU memory")


def test_what_will_quantize_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_on(planned(tmp_path / "out", compute=CPU))
    monkeypatch.setenv("REAP2GGUF_KERNELS", "off")
    assert one_line(needs, "quantizing") == (
        "libggml, about ten times slower than compiled kernels; no kernels: "
        "REAP2GGUF_KERNELS is off"
    )
    # a build says it itself, when it has tried the kernels
    assert not any("quantizing" in line for line in up_to_date_or_lines(needs.plan, needs))


def test_what_does_not_fit(tmp_path: Path) -> None:
    full = needs_on(planned(tmp_path / "out"), laptop(disk_free_bytes=2**20))
    assert one_line(full, "disk").endswith("1 MiB free: NOT ENOUGH")
    assert one_line(full, "warning").startswith("not enough disk: ")
    small = planned(tmp_path / "out", compute=replace(CPU, memory=2**23))
    assert one_line(needs_on(small), "memory") == "NOT ENOUGH"
    assert "--memory 8 MiB is too small" in one_line(needs_on(small), "warning")


def test_a_long_time_has_another_way(tmp_path: Path) -> None:
    rows = Amount(1024, 2**32, 2**32, 0, 2048, 2**20, "at most")
    needs = needs_on(planned(tmp_path / "out")).with_amount(rows)
    assert "; on an H100 about " in one_line(needs, "time")
    assert one_line(needs, "try").startswith("--samples ")


def test_what_is_reused(tiny: Path, tmp_path: Path) -> None:
    build(tiny, tmp_path / "out")
    plan = make_plan(options(tiny, tmp_path / "out", compression=0.5))
    assert one_line(needs_on(plan), "reused") == "texts, observe"
    finished = make_plan(options(tiny, tmp_path / "out"))
    needs = needs_on(finished)
    assert text_of(needs).splitlines()[-1] == "  up to date: nothing is left to do"
    assert list(up_to_date_or_lines(finished, needs)) == []
    assert list(up_to_date_or_lines(plan, needs_on(plan)))


def test_json_is_a_contract(tmp_path: Path) -> None:
    plan = planned(tmp_path / "out")
    needs = needs_on(plan)
    values = plan_as_json(plan, needs)
    assert json.loads(json.dumps(values)) == values
    assert values["machine"] == {
        "device": "cpu",
        "gpu": None,
        "gpu_memory_bytes": None,
        "memory_bytes": LAPTOP.memory_bytes,
        "memory_free_bytes": LAPTOP.memory_free_bytes,
        "disk_free_bytes": LAPTOP.disk_free_bytes,
        "cores": 2,
    }
    assert values["quantizers"].keys() == {
        "kernels", "problem", "on_gpu", "by_kernels", "by_libggml",
    }  # fmt: skip
    quantized = [name for key in ("by_kernels", "by_libggml") for name in values["quantizers"][key]]
    assert {"Q4_K", "Q8_0"} <= set(quantized)
    found = values["estimate"]
    assert found.keys() == {
        "disk_bytes", "work_bytes", "disk_peak_bytes", "memory_bytes", "gpu_memory_bytes",
        "seconds", "stages", "hidden_states",
    }  # fmt: skip
    assert found["disk_bytes"] + found["work_bytes"] == found["disk_peak_bytes"]
    assert found["hidden_states"] == {"bytes": needs.sweeps.hidden_bytes, "where": "device"}
    assert 0 < found["seconds"] <= sum(found["stages"].values()) + 0.1, "stages overlap"
    assert (values["reused"], values["fits"], values["problems"]) == ([], True, [])
    assert [offer["gpu"] for offer in values["rented"]] == [*GPUS]
    assert all(
        offer.keys() == {"gpu", "gpu_memory_bytes", "memory_bytes", "disk_bytes", "seconds", "fits"}
        for offer in values["rented"]
    )
    on_gpu = plan_as_json(plan, needs_on(plan, H100))
    assert on_gpu["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert on_gpu["estimate"]["gpu_memory_bytes"] > on_gpu["estimate"]["hidden_states"]["bytes"]


def test_the_command(tmp_path: Path) -> None:
    command = ["plan", str(EXAMPLE), "--recipe", "q4km", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 0, found.output
    assert "blk.*." not in found.stdout
    assert "blk.*." in CliRunner().invoke(cli, [*command, "--tensors"]).stdout
    assert "blk.*." in CliRunner().invoke(cli, [*command, "--verbose"]).stdout
    assert json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)["fits"] is True
    refused = CliRunner().invoke(cli, [*command, "--memory", "8"])
    assert refused.exit_code == 2
    assert "8 has no unit; write 8GiB" in refused.output
