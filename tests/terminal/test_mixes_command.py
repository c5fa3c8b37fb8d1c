"""`reap2gguf mixes`: what it prints, for people and for programs."""

from __future__ import annotations

import json

from reap2gguf.calibration.spec import DEFAULT_MIX, shipped_mixes
from tests.test_cli import one_line, run


def test_the_list_has_every_mix() -> None:
    lines = run("mixes", "list").stdout.splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert rows.keys() >= {DEFAULT_MIX, *shipped_mixes()}
    assert "program" in rows[DEFAULT_MIX]
    assert rows["seed-002"].split()[1:5] == ["1,024", "2.1", "M", "Hub"]


def test_one_mix_shows_its_parts() -> None:
    shown = run("mixes", "show", "Seed-000").stdout
    assert "open-r1/Mixture-of-Thoughts[code]       250 rows" in shown
    assert "at most 4,096 tokens each; at most 4.1 M tokens" in shown
    assert ":250' --max-length 4096 --pack" in shown
    assert "SWE-smith-trajectories(tool)" in run("mixes", "show", "reap-agentic").stdout
    assert "dialogue.jsonl" in run("mixes", "show", "default").stdout


def test_mixes_for_programs() -> None:
    listed = json.loads(run("mixes", "list", "--json").stdout)
    assert [mix["name"] for mix in listed] == [DEFAULT_MIX, *shipped_mixes()]
    assert listed[0]["is_local"] is True
    assert listed[0]["rows"] is None
    assert listed[0]["bytes"] == sum(part["n_bytes"] for part in listed[0]["parts"])
    shown = json.loads(run("mixes", "show", "reap-agentic", "--json").stdout)
    assert (shown["rows"], shown["tokens"]) == (24576, 24576 * 16384)
    assert shown in listed


def test_an_unknown_mix_suggests_the_nearest() -> None:
    one_line(run("mixes", "show", "seed-00"), "no mix 'seed-00'; did you mean seed-002?")
