"""Builds of a file that is to have a size: its types are chosen when the importance is known.

Rows of 64 and 32 have types with blocks of 32 alone, of which no table has to be made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.building import fit_stage, sized, stages
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.building.plan import make_plan
from reap2gguf.errors import RecipeError, UsageError
from reap2gguf.fitting import errors_table
from reap2gguf.fitting.card import RESERVE
from reap2gguf.options import BuildOptions
from reap2gguf.progress import CallbackProgress
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.plan_views import plan_lines
from tests.building.builds import build, contents, options, stages_reused
from tests.tiny import TinyQwen3Moe

SIZE = 190_000  # bytes; as Q8_0 the pruned model has more
ORDER = ["texts", "observe", "prune", "imatrix", "fit", "export", "verify"]


@dataclass(frozen=True)
class Made:
    model: Path
    result: BuildResult


def sized_build(model: Path, output: Path, **changes: Any) -> BuildResult:
    target = {} if {"target_bpw", "fit"} & {*changes} else {"target_size": SIZE}
    return build(model, output, **{"recipes": (), **target, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("sized")
    model = TinyQwen3Moe().write(folder / "tiny")
    return Made(model, sized_build(model, folder / "out"))


def the_file(result: BuildResult, label: str = "FIT-190000B") -> Path:
    (path,) = result.gguf_folder.glob(f"*-{label}.gguf")
    return path


def test_the_file_has_the_size_and_its_recipe_lies_beside_it(made: Made, tmp_path: Path) -> None:
    path = the_file(made.result)
    assert [*stages_reused(made.result)] == ORDER
    assert 0.98 * SIZE < path.stat().st_size <= SIZE  # a tiny model has few tensors to choose for
    assert [one.file for one in made.result.manifest.gguf] == [path.name]
    (record,) = made.result.manifest.gguf
    toml = path.with_suffix(".toml")
    assert toml.read_text() == record.recipe_source
    assert record.recipe == "fit-190000b"
    assert record.title.startswith("Fitted to a file of 185.55 KiB, ")
    # an ordinary recipe: `quantize` makes the same tensors with it
    assert made.result.hf_folder is not None
    again = reap2gguf.quantize(
        made.result.hf_folder,
        str(toml),
        tmp_path / "again.gguf",
        imatrix=made.result.gguf_folder / "imatrix.gguf",
    )
    assert again.tensor_types == dict(record.tensors)
    tensors = [
        {one.name: one.data.tobytes() for one in GGUFReader(file).tensors}
        for file in (path, again.path)
    ]
    assert tensors[0] == tensors[1]
    assert not reap2gguf.verify(made.result.gguf_folder).violations


def test_types_are_those_of_recipes_fit(made: Made, tmp_path: Path) -> None:
    (record,) = made.result.manifest.gguf
    assert made.result.hf_folder is not None
    found = reap2gguf.fit_recipe(
        made.result.hf_folder,
        tmp_path / "x.toml",
        imatrix=made.result.gguf_folder / "imatrix.gguf",
        target_bpw=record.bits_per_weight + 1e-4,
        sensitivity="table",
    )
    assert found.tensor_types == dict(record.tensors)


def interrupt_while_measuring(patch: pytest.MonkeyPatch) -> None:
    measure, done = errors_table._measure_one, []

    def some(*arguments: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments)
        return measure(*arguments)

    patch.setattr(errors_table, "_measure_one", some)
    patch.setattr(errors_table, "_SECONDS_KEPT", 0.0)


def interrupt_before_export(patch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, hashes: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(stages.Export, "_write", stop)


def interrupt_when_chosen(patch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(fit_stage, "write_whole", stop)


@pytest.mark.parametrize(
    "interrupt", [interrupt_while_measuring, interrupt_when_chosen, interrupt_before_export]
)
def test_an_interrupted_build_leaves_the_same_bytes(
    made: Made, interrupt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            sized_build(made.model, tmp_path / "out")
    plan = make_plan(options(made.model, tmp_path / "out", recipes=(), target_size=SIZE))
    reused = estimate(plan).reused.stages
    again = sized_build(made.model, tmp_path / "out")
    found = stages_reused(again)
    assert found["imatrix"]
    assert found["fit"] == (interrupt is interrupt_before_export) == ("fit" in reused)
    assert contents(again) == contents(made.result)


def test_what_was_measured_before_a_kill_is_not_measured_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_while_measuring(patch)
        with pytest.raises(KeyboardInterrupt):
            sized_build(made.model, tmp_path / "out")
    measure, names = errors_table._measure_one, []

    def counted(host: Any, making: Any, tensor: Any, types: Any) -> Any:
        names.append(tensor.name)
        return measure(host, making, tensor, types)

    monkeypatch.setattr(errors_table, "_measure_one", counted)
    sized_build(made.model, tmp_path / "out")
    assert 0 < len(names) < 16  # of 16 tensors that are quantized


def test_the_same_command_has_nothing_to_do_and_another_target_adds_a_file(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = made.result.gguf_folder.parent
    again = sized_build(made.model, output)
    assert not again.stages
    monkeypatch.setattr(errors_table, "_measure_one", lambda *_: pytest.fail("measured again"))
    more = sized_build(made.model, output, target_bpw=6)
    assert [stage.name for stage in more.stages] == ["export", "verify"]
    assert [one.label for one in more.manifest.gguf] == ["FIT-190000B", "FIT-6BPW"]
    assert more.manifest.gguf[1].bits_per_weight <= 6
    for record in more.manifest.gguf:
        toml = more.gguf_folder / record.toml_file
        assert toml.read_text() == record.recipe_source
    assert not reap2gguf.verify(more.gguf_folder).violations
    # the files of both are there: nothing is left to do for either
    assert not sized_build(made.model, output).stages
    assert not sized_build(made.model, output, target_bpw=6).stages


def test_a_recipe_beside_its_file_is_verified(made: Made, tmp_path: Path) -> None:
    result = sized_build(made.model, tmp_path / "out")
    toml = the_file(result).with_suffix(".toml")
    toml.write_text(toml.read_text().replace("Q", "q", 1))
    found = reap2gguf.verify(result.gguf_folder).violations
    assert any(toml.name in line for line in found)
    toml.unlink()
    assert any(toml.name in line for line in reap2gguf.verify(result.gguf_folder).violations)


def test_given_types_other_recipes_and_a_label(made: Made, tmp_path: Path) -> None:
    notes: list[str] = []
    result = build(
        made.model,
        tmp_path / "out",
        CallbackProgress(lambda event: notes.append(event.text)),
        recipes=("Q8_0",),
        target_bpw=7.0,
        labels={"fit": "MINE"},
        tensor_types=("attn_v=F16",),
    )
    first, second = result.manifest.gguf
    assert (first.label, second.label) == ("Q8_0", "MINE")
    types = {name: one for name, one in second.tensors.items() if "attn_v" in name}
    assert len(types) == 2
    assert {*types.values()} == {"F16"}
    assert second.bits_per_weight <= 7
    assert any(text.startswith("MINE: types chosen for 7 bits per weight: ") for text in notes)


def test_a_plan_says_what_is_known(made: Made, tmp_path: Path) -> None:
    asked = options(made.model, tmp_path, recipes=(), fit=RESERVE + 6_500_000)
    plan = make_plan(asked)
    text = " ".join(" ".join(plan_lines(plan, needs := estimate(plan))).split())
    assert "types are chosen when the importance matrix is known, for a GPU of" in text
    assert "at a context of 512 tokens: KV cache" in text
    assert needs.stages["fit"] > 0
    found = plan_as_json(plan, needs)["target"]
    assert found["memory"] == RESERVE + 6_500_000
    assert found["counted"]["context"] == 512
    assert found["file"].endswith("-FIT-543370912B-512.gguf")  # all that the model has
    assert plan_as_json(make_plan(options(made.model, tmp_path)), needs)["target"] is None


def test_a_context_is_the_models_at_most(made: Made, tmp_path: Path) -> None:
    changes = {"recipes": (), "fit": RESERVE + 6_500_000, "compression": "auto"}
    notes: list[str] = []
    plan = make_plan(options(made.model, tmp_path, **changes), notes.append)
    assert plan.name == "tiny-auto-543370912B-512"
    assert plan.recipes[-1].title.startswith("Fitted to a GPU of 518.20 MiB and a context of 512 ")
    assert not [line for line in notes if "--fit-context" in line]  # none was asked for
    plan = make_plan(options(made.model, tmp_path, fit_context=256, **changes), notes.append)
    assert plan.name == "tiny-auto-543370912B-256"
    assert not [line for line in notes if "--fit-context" in line]
    plan = make_plan(options(made.model, tmp_path, fit_context=1024, **changes), notes.append)
    assert plan.name == "tiny-auto-543370912B-512"
    (line,) = [line for line in notes if "--fit-context" in line]
    assert line.startswith("--fit-context 1024: the model was trained on 512 tokens")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_size": 60_000}, r"pass at least --target-size \d+B, or prune more experts"),
        ({"target_bpw": 3.0}, r"pass at least --target-bpw 4\.\d\d, or prune more"),
        (
            {"fit": RESERVE + 5_600_000},
            r"leaves 0 bytes .*least --fit \d+B, a smaller --fit-context",
        ),
        (
            {"fit": RESERVE + 6_050_000},
            r"smallest types .*--fit \d+B, a smaller --fit-context, or",
        ),
        ({"target_bpw": 5.0, "fit_context": 4096}, "pass --fit"),
        ({"target_bpw": 5.0, "target_size": 190_000}, "pass one of"),
        ({"target_bpw": 5.0, "recipes": ("Q8_0",), "labels": {"fit": "q8_0"}}, "two recipes"),
    ],
)
def test_too_small_a_target_is_refused_in_the_plan(
    made: Made, changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sized, "choose_types", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(UsageError, match=words):
        make_plan(options(made.model, tmp_path, **{"recipes": (), **changes}))


def test_a_given_type_that_a_tensor_cannot_have(made: Made, tmp_path: Path) -> None:
    changes = {"recipes": (), "target_bpw": 6.0}
    with pytest.raises(RecipeError, match="has blocks of 256"):
        make_plan(options(made.model, tmp_path, tensor_types=("attn_v=Q4_K",), **changes))
    with pytest.raises(RecipeError, match="matches no tensor"):
        make_plan(options(made.model, tmp_path, tensor_types=("attn_x=Q8_0",), **changes))


def test_no_recipe_is_named() -> None:
    assert BuildOptions().recipes == ("Q4_K_M",)
    assert BuildOptions(target_bpw=4.0).recipes == ()
    assert BuildOptions(target_bpw=4.0, recipes=("Q4_K_M",)).recipes == ("Q4_K_M",)
    with pytest.raises(UsageError, match="recipes is empty"):
        BuildOptions(recipes=())
