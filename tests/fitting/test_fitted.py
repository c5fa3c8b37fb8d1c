"""Recipes for a size, and the files that they make of tiny models."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, LlamaFileType
from gguf import GGMLQuantizationType as Type

import reap2gguf
from reap2gguf import FitResult
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.fitting.card import card_use
from reap2gguf.fitting.errors_table import TYPES, Cache
from reap2gguf.fitting.fitted import Named, Problem, free_tensors, guess
from reap2gguf.fitting.sensitivity import sensitivities
from reap2gguf.fitting.target import SizeTarget
from reap2gguf.gguf_files.imatrix import save_gguf
from reap2gguf.models.table import describe
from reap2gguf.progress import CallbackProgress
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import resolve
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.quantized import as_mxfp4
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe


@dataclass(frozen=True)
class Model:
    folder: Path
    imatrix: Path

    def fit(self, output: Path, **target: Any) -> FitResult:
        return reap2gguf.fit_recipe(
            self.folder,
            output,
            imatrix=self.imatrix,
            threads=1,
            sensitivity="table",
            **target,
        )


def written(folder: Path, made: TinyQwen3Moe | TinyQwen35Moe) -> Model:
    made.write(folder / "model")
    save_gguf(random_imatrix(gguf_tensors(folder / "model")), folder / "imatrix.gguf")
    return Model(folder / "model", folder / "imatrix.gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = TinyQwen3Moe(hidden=256, width=256, head_dim=64, n_layers=3)
    return written(tmp_path_factory.mktemp("wide"), made)


@pytest.mark.parametrize("share", [0.17, 0.3, 0.45])
def test_the_file_has_the_size(model: Model, share: float, tmp_path: Path) -> None:
    whole = sum(path.stat().st_size for path in model.folder.glob("*.safetensors"))
    target = int(whole * share)
    found = model.fit(tmp_path / "mine.toml", target_size=target)
    result = reap2gguf.quantize(
        model.folder, str(found.path), tmp_path / "x.gguf", imatrix=model.imatrix, threads=1
    )
    assert result.n_bytes == found.n_bytes
    assert 0.995 * target - 2**13 < found.n_bytes <= target
    assert result.tensor_types == found.tensor_types
    read = {one.name: one.tensor_type.name for one in GGUFReader(tmp_path / "x.gguf").tensors}
    assert read == found.tensor_types
    assert 0 <= found.gap < 0.2


def test_a_target_above_the_largest_file_says_so(model: Model, tmp_path: Path) -> None:
    """All is BF16 then, and so are the file type of the recipe and that of the header."""
    notes: list[str] = []
    progress = CallbackProgress(lambda event: notes.append(event.text))
    whole = sum(path.stat().st_size for path in model.folder.glob("*.safetensors"))
    found = model.fit(tmp_path / "a.toml", target_size=2 * whole, progress=progress)
    assert {*found.tensor_types.values()} == {"BF16", "F32"}
    assert found.file_type == "BF16"
    assert 'file_type = "BF16"' in found.path.read_text()
    (line,) = (line for line in notes if "nothing is gained above" in line)
    assert f"({found.bits_per_weight:.2f} bits per weight)" in line
    result = reap2gguf.quantize(
        model.folder, str(found.path), tmp_path / "x.gguf", imatrix=model.imatrix, threads=1
    )
    assert result.n_bytes == found.n_bytes
    keys = GGUFReader(tmp_path / "x.gguf").fields
    assert keys["general.file_type"].contents() == LlamaFileType.MOSTLY_BF16
    notes.clear()
    model.fit(tmp_path / "b.toml", target_size=found.n_bytes, progress=progress)
    assert not [line for line in notes if "nothing is gained" in line]


@pytest.mark.parametrize("file_type", ["Q5_K_M", "Q3_K_M", "IQ2_M"])
def test_less_is_lost_than_by_a_file_type_of_this_size(
    model: Model, file_type: str, tmp_path: Path
) -> None:
    with Checkpoint.open(model.folder) as checkpoint:
        described = describe(checkpoint)
        tensors = described.gguf_tensors(checkpoint.tensors)
    facts = described.facts
    own = resolve(load_recipe(file_type), tensors, facts, facts.n_experts, True)
    found = model.fit(tmp_path / "mine.toml", target_bpw=own.bits_per_weight)
    assert 0.995 * own.bits_per_weight < found.bits_per_weight <= own.bits_per_weight
    (cached,) = tmp_path.glob("*.type-errors.json")
    key = cached.read_text().split('"key": "')[1].split('"')[0]
    errors = Cache(cached, key).load(pytest.fail)
    weights = sensitivities(tensor.name for tensor in free_tensors(tensors))
    types = own.tensor_types()
    ours, theirs = (
        sum(weight * errors[name][which[name]] for name, weight in weights.items())
        for which in (found.tensor_types, {name: one.name for name, one in types.items()})
    )
    assert ours < theirs


def test_another_target_measures_nothing_and_equal_calls_write_equal_files(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.fit(tmp_path / "a.toml", target_bpw=5)
    monkeypatch.setattr(
        "reap2gguf.fitting.errors_table._measure_one", lambda *_: pytest.fail("measured again")
    )
    again = model.fit(tmp_path / "a.toml", target_bpw=5, overwrite=True)
    assert again == first
    smaller = model.fit(tmp_path / "b.toml", target_bpw=4)
    assert smaller.n_bytes < first.n_bytes
    assert sorted(os.listdir(tmp_path)) == ["a.toml", "b.toml", "model.type-errors.json"]


def test_rows_of_other_widths_and_other_layers(tmp_path: Path) -> None:
    """Rows of 64 and 32 have types of blocks of 32 alone; a linear attention has other tensors."""
    model = written(tmp_path, TinyQwen35Moe())
    found = model.fit(tmp_path / "mine.toml", target_bpw=6)
    assert {*found.tensor_types.values()} <= {
        "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL",
    }  # fmt: skip
    result = reap2gguf.quantize(
        model.folder, str(found.path), tmp_path / "x.gguf", imatrix=model.imatrix, threads=1
    )
    assert result.bits_per_weight == found.bits_per_weight <= 6


def test_what_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.toml"):
        model.fit(tmp_path / "mine.txt", target_bpw=4)
    with pytest.raises(UsageError, match="pass one of a target size"):
        model.fit(tmp_path / "mine.toml", target_bpw=4, target_size=2**20)
    with pytest.raises(UsageError, match="pass a target"):
        model.fit(tmp_path / "mine.toml")
    with pytest.raises(UsageError, match="--fit-context is the context of --fit"):
        model.fit(tmp_path / "mine.toml", target_bpw=4, fit_context=4096)
    with pytest.raises(UsageError, match="at most 16"):
        model.fit(tmp_path / "mine.toml", target_bpw=float("nan"))
    with pytest.raises(UsageError, match="pass at least --target-size"):
        model.fit(tmp_path / "mine.toml", target_size=2**10)
    with pytest.raises(UsageError, match=r"pass at least --target-bpw 1\.66, or prune"):
        model.fit(tmp_path / "mine.toml", target_bpw=1)
    with pytest.raises(UsageError, match=r"KV cache .* smaller --fit-context"):
        model.fit(tmp_path / "mine.toml", fit=2**29 + 2**24, fit_context=4096)
    other = written(tmp_path, TinyQwen3Moe())
    with pytest.raises(ArtifactError, match="another model"):
        Model(model.folder, other.imatrix).fit(tmp_path / "mine.toml", target_bpw=4)
    assert not (tmp_path / "mine.toml").exists()
    assert not [*tmp_path.glob("*.type-errors.json")]  # nothing was measured


def test_a_file_and_its_context_fit_a_card(model: Model, tmp_path: Path) -> None:
    with Checkpoint.open(model.folder) as checkpoint:
        # of a context of 1024 tokens, the model was trained on 512
        use = card_use(describe(checkpoint), 534 * 2**20, 512)
    found = model.fit(tmp_path / "mine.toml", fit=use.card, fit_context=1024)
    assert found.counted == use.words
    assert 0.995 * use.left - 2**13 < found.n_bytes <= use.left
    assert 'label = "FIT-534MiB-512"' in found.path.read_text()


def test_types_that_are_given_are_no_choice(model: Model) -> None:
    with Checkpoint.open(model.folder) as checkpoint:
        described = describe(checkpoint)
        tensors = described.gguf_tensors(checkpoint.tensors)
    facts = described.facts
    fixed = {one.name: Type.F16 for one in tensors if "attn_v" in one.name}
    problem = Problem(tensors, facts, facts.n_experts, random_imatrix(tensors).entries, fixed)
    n_bytes = int(4.5 * problem.n_weights / 8)
    found = guess(Named("x", "X", SizeTarget(bpw=4.5)), problem, TYPES, n_bytes)
    types = found.resolved.tensor_types()
    assert {one: types[one] for one in fixed} == fixed
    assert len(fixed) == facts.n_layers
    assert 0.99 * n_bytes < found.resolved.n_bytes <= n_bytes
    assert found.recipe.title == f"Fitted to {found.resolved.bits_per_weight:.2f} bits per weight"
    assert Type.F16 not in {types[one.name] for one in problem.to_measure()}


def test_experts_in_mxfp4_stay_so_or_become_smaller(tmp_path: Path) -> None:
    """Rows of 64 and 96 fill no blocks of fewer bits, those of 256 do."""
    for hidden, width, bits in ((64, 96, 6.0), (256, 256, 4.0)):
        folder = tmp_path / str(hidden)
        as_mxfp4(replace(GPT_OSS, hidden=hidden, width=width)).write(folder / "model")
        save_gguf(random_imatrix(gguf_tensors(folder / "model")), folder / "imatrix.gguf")
        made = Model(folder / "model", folder / "imatrix.gguf").fit(
            folder / "a.toml", target_bpw=bits
        )
        types = [one for name, one in made.tensor_types.items() if name.endswith("_exps.weight")]
        assert "MXFP4" in types or hidden == 256
        least = 4.25 if hidden == 64 else 0
        for one in set(types):
            block, n_bytes = GGML_QUANT_SIZES[Type[one]]
            assert least <= 8 * n_bytes / block <= 4.25
