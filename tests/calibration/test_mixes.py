from __future__ import annotations

from pathlib import Path

import pytest

from reap2gguf.building.plan import make_plan
from reap2gguf.calibration.spec import decide, parse_mixes, shipped_mixes
from reap2gguf.errors import CalibrationError
from reap2gguf.options import BuildOptions, CalibrationOptions
from reap2gguf.terminal.click_options import calibration_options
from tests.tiny import EXAMPLE


@pytest.mark.parametrize("name", shipped_mixes())
def test_a_shipped_mix_can_be_planned(name: str, tmp_path: Path) -> None:
    options = CalibrationOptions(name)
    plan = make_plan(BuildOptions(("q8_0",), str(EXAMPLE), output=tmp_path, calibration=options))
    found = plan.calibration
    assert found.label == name
    assert found.is_composite
    assert found.samples == sum(one.count or 0 for one in found.components)
    assert all("/" in one.name and not one.is_local for one in found.components)
    assert decide(CalibrationOptions(name, 5, 64)).max_length == 64
    assert found.pack, "made with REAP, which packs"
    assert not decide(CalibrationOptions(name, pack=False)).pack


@pytest.mark.parametrize("spec", ["default", "owner/name", "owner/name:5"])
def test_other_samples_stay_apart_unless_asked(spec: str) -> None:
    assert not decide(CalibrationOptions(spec)).pack
    assert decide(CalibrationOptions(spec, pack=True)).pack


def test_the_mixes_are_as_published() -> None:
    """By hand, from the cards and REAP's README."""
    mot = "open-r1/Mixture-of-Thoughts"
    expected = {
        "seed-000": (1000, 4096, [f"{mot}[{one}]" for one in ("code", "math", "science")]),
        "seed-002": (1024, 2048, []),
        "reap-agentic": (24576, 16384, ["SWE-bench/SWE-smith-trajectories(tool):4096"]),
    }
    assert shipped_mixes().keys() == expected.keys()
    for name, (samples, length, words) in expected.items():
        found = decide(CalibrationOptions(name))
        assert (found.samples, found.max_length) == (samples, length)
        assert all(word in found.spec for word in ["theblackcat102/evol-codealpaca-v1", *words])


def test_the_help_names_every_mix() -> None:
    def command() -> None: ...

    calibration_options(command)
    (option,) = (one for one in command.__click_params__ if one.name == "spec")  # type: ignore
    assert all(name in option.help for name in shipped_mixes())


GOOD = '[m]\ntitle = "t"\nspec = "a/b:1"\nmax_length = 64\nsource = "s"\n'


def test_a_mix_is_read() -> None:
    found = parse_mixes(GOOD, Path("m.toml"))["m"]
    assert (found.max_length, found.pack) == (64, False)
    assert parse_mixes(GOOD + "pack = true\n", Path("m.toml"))["m"].pack


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "t"', 'title = "t"\nsamples = 5', "expected a table of title, spec"),
        ('title = "t"\n', "", "expected a table of"),
        ("[m]", "x = 5\n[m]", "mix 'x': expected a table"),
        ("64", '"64"', "max_length is '64'"),
        ("64", "true", "max_length is True"),
        ("[m]", "[m]\npack = 1", "pack is 1"),
        ("64", "1", "its max_length is out of range"),
        ("a/b:1", "a/b", "not a composite"),
        ("a/b:1", "a:1,b", "component 2 of 2"),
        ("[m]", "[m", "not valid TOML"),
    ],
)
def test_a_broken_mix(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(CalibrationError, match=message):
        parse_mixes(GOOD.replace(old, new), Path("m.toml"))
