"""What a refusal names is enough: the same command with it succeeds, and with less it does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.building.plan import make_plan
from reap2gguf.errors import UsageError
from reap2gguf.fitting.solving import Measuring, either
from reap2gguf.gguf_files.imatrix import save_gguf
from reap2gguf.options import BuildOptions
from tests.building.builds import build, options
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MODELS = {
    "narrow": TinyQwen3Moe(),  # rows with blocks of 32 alone
    # rows with blocks of 256, so that types of less than 2 bits count
    "wide": TinyQwen3Moe(hidden=256, width=256, head_dim=64),
    "hybrid": TinyQwen35Moe(),
}
TARGETS = {"target-size": 1000, "target-bpw": 1.0, "fit": 2**29}


@dataclass(frozen=True)
class Made:
    folder: Path
    name: str


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("sizes") / f"a-model-that-is-{request.param}"
    return Made(MODELS[request.param].write(folder), request.param)


def named(attempt: Callable[[dict[str, Any]], Any], target: str, value: float) -> tuple[str, float]:
    """The option and the value that a refusal names."""
    with pytest.raises(UsageError) as refused:
        attempt({target: value})
    match = re.search(r"pass at least --(target-size|target-bpw|fit) ([\d.]+)", str(refused.value))
    assert match is not None, str(refused.value)
    return match[1], float(match[2]) if match[1] == "target-bpw" else int(match[2])


def is_least(attempt: Callable[[dict[str, Any]], Any], target: str, value: float) -> Any:
    """What an attempt makes with the value that is named; a step below it is refused."""
    option, least = named(attempt, target, value)
    below = least - (0.02 if option == "target-bpw" else 1)
    # a refusal right below it, and one at half of it, name the same
    assert named(attempt, option, below) == (option, least)
    return attempt({option: least})


@pytest.mark.parametrize("compression", ["auto", 0, 0.5])
@pytest.mark.parametrize("target", TARGETS)
def test_of_a_plan(made: Made, tmp_path: Path, target: str, compression: Any) -> None:
    def planned(values: dict[str, Any]) -> Any:
        return make_plan(asked(made, tmp_path, compression, values))

    plan = is_least(planned, target, TARGETS[target])
    if compression == "auto":
        assert plan.counts == (plan.model.facts.n_experts // 2,)  # the fewest


def asked(made: Made, output: Path, compression: Any, values: dict[str, Any]) -> BuildOptions:
    targets = {name.replace("-", "_"): value for name, value in values.items()}
    return options(made.folder, output, recipes=(), compression=compression, **targets)


@pytest.mark.parametrize("target", TARGETS)
def test_of_recipes_fit(
    made: Made, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guessed(self: Measuring, problem: Any, budget: Any, progress: Any) -> Any:
        return problem.nominal_errors(budget.types)

    monkeypatch.setattr(Measuring, "errors", guessed)  # what is measured changes no size
    imatrix = tmp_path / "imatrix.gguf"
    save_gguf(random_imatrix(gguf_tensors(made.folder)), imatrix)

    def fitted(values: dict[str, Any]) -> Any:
        targets = {name.replace("-", "_"): value for name, value in values.items()}
        output = tmp_path / "x.toml"
        return reap2gguf.fit_recipe(
            made.folder, output, imatrix=imatrix, sensitivity="table", threads=1, **targets
        )

    found = is_least(fitted, target, TARGETS[target])
    assert found.n_rules


@pytest.mark.parametrize("made", ["narrow"], indirect=True)
def test_a_build_of_the_least_size(made: Made, tmp_path: Path) -> None:
    def planned(values: dict[str, Any]) -> Any:
        return make_plan(asked(made, tmp_path, "auto", values))

    _, least = named(planned, "target-size", 1000)
    values = {"recipes": (), "compression": "auto", "target_size": int(least)}
    found = build(made.folder, tmp_path, **values)
    assert found.manifest.pruning.n_kept == 4
    assert found.manifest.gguf[0].n_bytes <= least
    # it has all but the room for what a header may hold
    assert found.manifest.gguf[0].n_bytes > least - 2**12


def test_the_advice_suits_what_was_asked(made: Made, tmp_path: Path) -> None:
    def refusal(**changes: Any) -> str:
        values = {"recipes": (), "target_size": 1000, **changes}
        with pytest.raises(UsageError) as refused:
            make_plan(options(made.folder, tmp_path, **values))
        return str(refused.value)

    weighed = refusal(compression="auto")
    assert "the fewest that are weighed" in weighed
    assert weighed.endswith(
        "B, or fewer experts by --keep-experts, for a build in place of --compression auto"
    )
    assert "prune more" not in weighed
    assert refusal(compression=0).endswith("B, or prune more experts")


def test_ways_out() -> None:
    assert either(["pass x"]) == "pass x"
    assert either(["pass x", "y", "do z"]) == "pass x, y, or do z"
