"""Values of a GGUF file against the weights: what quantizing makes passes, every damage is found.

The weights are those of a tiny model with matrices that are hard to bound: of zeros, sparse, with
outliers, very small and very large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from reap2gguf.ggml import NEEDS_IMPORTANCE, STORABLE, load_ggml
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.recipe import Recipe, Rule
from reap2gguf.verifying.exactness import EXACT_TYPES, Exactness
from reap2gguf.verifying.gguf_values import (
    Compared,
    check_values,
    compare_values,
)
from tests.exporting.files import export_files, gguf_tensors, random_imatrix, write_small_tokenizer
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe
from tests.verifying.gguf_changes import Rows, change_rows

SHAPE = TinyQwen3Moe(n_layers=1, hidden=256, width=256, n_experts=3, head_dim=64, vocab=291)
BOUNDED = sorted((STORABLE - EXACT_TYPES), key=lambda one: one.name)
EXACT = sorted(EXACT_TYPES, key=lambda one: one.name)
# so few bits that a bound finds only what is lost as a whole
COARSE = ("IQ1_M", "IQ1_S", "IQ2_XXS")
SLOW = (*COARSE, "IQ2_S", "IQ2_XS", "IQ3_S", "IQ3_XXS")  # to quantize
SCALE_AT = {"Q6_K": 208, "Q3_K": 108, "Q2_K": 80}  # where a block has its float16 scale
LAYER = "model.layers.0."


def hard(tensors: dict[str, torch.Tensor]) -> None:
    """Give the matrices values that are hard to bound."""
    attention, expert = LAYER + "self_attn.", LAYER + "mlp.experts."
    tensors[attention + "k_proj.weight"].zero_()
    tensors[attention + "q_proj.weight"].copy_(torch.eye(256))
    sparse = tensors[attention + "v_proj.weight"]
    sparse *= torch.rand(sparse.shape, generator=torch.Generator().manual_seed(1)) < 0.03
    outliers = tensors[attention + "o_proj.weight"]
    outliers[::3, 17] = 40
    outliers[5] = 0
    outliers[9, 32:] = 0
    tensors[expert + "0.up_proj.weight"].zero_()
    tensors[expert + "1.up_proj.weight"].mul_(1e-2)
    tensors[expert + "1.gate_proj.weight"].mul_(1e4)
    tensors[expert + "2.gate_proj.weight"][1::2] *= 1e-3
    tensors[expert + "0.down_proj.weight"][:, ::7] *= 100


def of_type(tensor_type: GGMLQuantizationType) -> Recipe:
    """All matrices of the layer in one type."""
    name = tensor_type.name
    if name in ("F32", "F16", "BF16"):
        return Recipe(name, name, name, name, (), "")
    return Recipe(name, name, name, "Q8_0", (Rule("blk.*.weight", tensor_type),), "")


@dataclass(frozen=True)
class Made:
    """A checkpoint and one file of it."""

    folder: Path
    path: Path
    imatrix: Imatrix | None

    def violations(self, exactness: Exactness, name: str | None = None) -> list[str]:
        """Of all tensors, or of one."""
        return self.compared(exactness, name).violations

    def compared(self, exactness: Exactness, name: str | None = None) -> Compared:
        """All tensors, or one."""
        header = read_gguf_header(self.path)
        with Checkpoint.open(self.folder) as checkpoint:
            tensors = describe(checkpoint).gguf_tensors(checkpoint.tensors)
            chosen = [tensor for tensor in tensors if name in (None, tensor.name)]
            return compare_values(header, checkpoint, chosen, exactness, 1, Silent())

    @property
    def within_bounds(self) -> Exactness:
        return Exactness(False, self.imatrix, load_ggml().label)

    @property
    def exact(self) -> Exactness:
        return Exactness(True, self.imatrix, load_ggml().label)


def checkpoint_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    SHAPE.write(folder)
    assert write_small_tokenizer(folder) == SHAPE.vocab
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def hard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("hard"), hard)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("random"), lambda tensors: None)


def make(
    folder: Path, target: Path, tensor_type: GGMLQuantizationType, imatrix: Imatrix | None
) -> Made:
    (path,) = export_files(folder, target, [of_type(tensor_type)], imatrix, 1).values()
    return Made(folder, path, imatrix)


def each_type(types: list[GGMLQuantizationType]) -> list[Any]:
    return [pytest.param(one, id=one.name, marks=_marks(one)) for one in types]


def _marks(one: GGMLQuantizationType) -> list[Any]:
    return [pytest.mark.slow] if one.name in SLOW else []


def test_a_type_that_loses_small_rows_is_not_made(hard_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="are too small for NVFP4, which would lose"):
        make(hard_folder, tmp_path, GGMLQuantizationType.NVFP4, None)


SOUND = [one for one in EXACT if one.name != "NVFP4"]


def with_and_without_importance() -> list[Any]:
    """Every type with importance, and without it those that do not need it."""
    return [
        pytest.param(one, weighted, id=f"{name}-{one.name}", marks=_marks(one))
        for weighted, name in ((False, "even"), (True, "weighted"))
        for one in SOUND + BOUNDED
        if weighted or one not in NEEDS_IMPORTANCE
    ]


@pytest.mark.parametrize(("tensor_type", "weighted"), with_and_without_importance())
def test_what_quantizing_makes_is_sound(
    tensor_type: GGMLQuantizationType, weighted: bool, hard_folder: Path, tmp_path: Path
) -> None:
    imatrix = random_imatrix(gguf_tensors(hard_folder)) if weighted else None
    made = make(hard_folder, tmp_path, tensor_type, imatrix)
    assert made.violations(made.within_bounds) == []
    assert made.violations(made.exact) == []
    if not weighted:
        assert made.violations(Exactness()) == []


@pytest.mark.parametrize("tensor_type", each_type(BOUNDED))
def test_unknown_importance_is_allowed_for(
    tensor_type: GGMLQuantizationType, folder: Path, tmp_path: Path
) -> None:
    made = make(folder, tmp_path, tensor_type, random_imatrix(gguf_tensors(folder)))
    assert made.violations(Exactness()) == []


def lose_a_row(rows: Rows, tensor_type: GGMLQuantizationType) -> None:
    rows[7] = 0


def swap_rows(rows: Rows, tensor_type: GGMLQuantizationType) -> None:
    rows[[3, 100]] = rows[[100, 3]]


def rotate_rows(rows: Rows, tensor_type: GGMLQuantizationType) -> None:
    rows[:] = np.roll(rows, 1, axis=0)


def lose_a_sector(rows: Rows, tensor_type: GGMLQuantizationType) -> None:
    rows.reshape(-1)[4096:4608] = 0


def double_a_scale(rows: Rows, tensor_type: GGMLQuantizationType) -> None:
    scale_of_a_block(rows, tensor_type)[:] *= 2


def change_the_sign_of_a_scale(rows: Rows, tensor_type: GGMLQuantizationType) -> None:
    scale_of_a_block(rows, tensor_type)[:] *= -1


def scale_of_a_block(rows: Rows, tensor_type: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The scale of the last block of row 11."""
    at = SCALE_AT.get(tensor_type.name, 0)
    block = rows[11, -GGML_QUANT_SIZES[tensor_type][1] :]
    found: np.ndarray[Any, Any] = block[at : at + 2].view("<f2")
    return found


DAMAGE = (
    lose_a_row, swap_rows, rotate_rows, lose_a_sector, double_a_scale, change_the_sign_of_a_scale
)  # fmt: skip


def damage_of_each_type() -> list[Any]:
    """Every type with every damage; the blocks of IQ1_M have no scale of their own."""
    of_a_scale = (double_a_scale, change_the_sign_of_a_scale)
    return [
        pytest.param(one, damage, id=f"{one.name}-{damage.__name__}", marks=_marks(one))
        for one in BOUNDED
        for damage in DAMAGE
        if not (one.name == "IQ1_M" and damage in of_a_scale)
    ]


@pytest.fixture(scope="module")
def damageable(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, GGMLQuantizationType]:
    """A file whose importance is known; tests leave it as it is."""
    target = tmp_path_factory.mktemp(request.param.name)
    imatrix = random_imatrix(gguf_tensors(folder))
    return make(folder, target, request.param, imatrix), request.param


@pytest.mark.parametrize(
    ("damageable", "damage"), damage_of_each_type(), indirect=["damageable"], scope="module"
)
def test_every_damage_of_every_tensor_is_found(
    damage: Callable[[Rows, GGMLQuantizationType], None],
    damageable: tuple[Made, GGMLQuantizationType],
) -> None:
    made, tensor_type = damageable
    whole = made.path.read_bytes()
    infos = read_gguf_header(made.path).tensors.values()
    names = [info.name for info in infos if info.tensor_type is tensor_type]
    assert len(names) == 7
    for name in names:
        change_rows(made.path, name, lambda rows: damage(rows, tensor_type))
        found = made.violations(made.within_bounds, name)
        without_importance = made.violations(Exactness(), name)
        made.path.write_bytes(whole)
        assert len(found) == 1, name
        if tensor_type.name not in (*COARSE, *SLOW):
            assert len(without_importance) == 1, name
    assert made.violations(made.within_bounds) == []


@pytest.mark.parametrize("tensor_type", each_type(EXACT + BOUNDED[-3:]))
def test_every_changed_bit_is_found(
    tensor_type: GGMLQuantizationType, folder: Path, tmp_path: Path
) -> None:
    made = make(folder, tmp_path, tensor_type, None)
    exactness = made.within_bounds if tensor_type in EXACT_TYPES else made.exact
    generator = np.random.default_rng(0)
    for name, info in read_gguf_header(made.path).tensors.items():
        byte, bit = generator.integers(info.n_bytes), generator.integers(8)
        change = partial(flip, byte=byte, bit=bit)
        change_rows(made.path, name, change)
        assert len(made.violations(exactness, name)) == 1, (name, byte, bit)
        change_rows(made.path, name, change)
    assert made.violations(exactness) == []


def flip(rows: Rows, byte: int, bit: int) -> None:
    rows.reshape(-1)[byte] ^= np.uint8(1 << bit)


def test_a_quantizer_that_is_wrong_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantizing again makes the same wrong bytes; what they mean is compared too."""
    quantize = Quantizer.quantize

    def quantize_wrongly(self: Quantizer, rows: Any, *arguments: Any) -> Any:
        return quantize(self, rows[::-1], *arguments)

    monkeypatch.setattr(Quantizer, "quantize", quantize_wrongly)
    for name in ("Q8_0", "Q4_K"):
        made = make(folder, tmp_path, GGMLQuantizationType[name], None)
        for exactness in (made.within_bounds, made.exact):
            found = made.violations(exactness, "blk.0.attn_q.weight")
            assert len(found) == 1
            assert "differs from model.layers.0.self_attn.q_proj.weight" in found[0]
            if name == "Q8_0" or exactness.every_type:
                assert "the type loses these values" in found[0]


def test_bytes_of_another_libggml_are_named(folder: Path, tmp_path: Path) -> None:
    made = make(folder, tmp_path, GGMLQuantizationType.Q4_K, None)
    name = "blk.0.attn_q.weight"
    change_rows(made.path, name, partial(flip, byte=144 * 9 + 20, bit=0))  # one step of one weight
    assert made.violations(made.within_bounds, name) == []
    (found,) = made.violations(Exactness(True, None, "0.1"), name)
    own = load_ggml().label
    assert f"made with libggml 0.1, which may round otherwise than libggml {own} here" in found
    (found,) = made.violations(made.exact, name)
    assert found.endswith("the bytes that Q4_K makes of it; no value errs more than the type does")


def test_exactness_needs_the_importance(folder: Path, tmp_path: Path) -> None:
    imatrix = random_imatrix(gguf_tensors(folder))
    made = make(folder, tmp_path, GGMLQuantizationType.Q4_K, imatrix)
    (found,) = made.violations(Exactness(True))
    assert "was quantized with an importance matrix" in found
    other = replace(imatrix, entries={**imatrix.entries, "blk.9.x": imatrix_entry(imatrix)})
    (found,) = made.violations(Exactness(True, other))
    assert "it is of another model" in found
    sums = {
        name: replace(one, sums=one.sums[:, ::-1].copy()) for name, one in imatrix.entries.items()
    }
    found = made.violations(Exactness(True, replace(imatrix, entries=sums)))[0]
    assert "expected the bytes that Q4_K makes of it" in found


def reversed_sums(entry: ImatrixEntry) -> ImatrixEntry:
    return replace(entry, sums=entry.sums[:, ::-1].copy())


def imatrix_entry(imatrix: Imatrix) -> ImatrixEntry:
    return next(iter(imatrix.entries.values()))


def test_the_last_bits_of_an_exponential(tmp_path: Path) -> None:
    """Two processors may differ in them; exact verification does not let them pass."""
    folder = TinyQwen35Moe(vision=False, mtp=False).write(tmp_path / "model")
    made = make(folder, tmp_path, GGMLQuantizationType.F32, None)
    name = "blk.0.ssm_a"
    change_rows(made.path, name, lambda rows: rows.view(np.int32).__iadd__(2))
    assert made.violations(Exactness(), name) == []
    assert len(made.violations(made.exact, name)) == 1
    change_rows(made.path, name, lambda rows: rows.view(np.int32).__iadd__(1))
    assert len(made.violations(Exactness(), name)) == 1
    norm = "blk.0.attn_norm.weight"
    change_rows(made.path, norm, lambda rows: rows.view(np.int32).__iadd__(1))
    assert len(made.violations(Exactness(), norm)) == 1


def test_values_alone_may_be_zero_but_not_nan(folder: Path, tmp_path: Path) -> None:
    made = make(folder, tmp_path, GGMLQuantizationType.BF16, None)
    change_rows(made.path, "blk.0.ffn_up_exps.weight", lambda rows: rows[:256].fill(0))
    header = read_gguf_header(made.path)
    assert list(check_values(header, 1, Silent())) == []
    change_rows(made.path, "blk.0.ffn_up_exps.weight", lambda rows: rows[600].fill(0xFF))
    (found,) = check_values(header, 1, Silent())
    assert found == "BF16.gguf: blk.0.ffn_up_exps.weight expert 2 holds NaN or infinite values"


def test_lost_and_swapped_experts_are_named(folder: Path, tmp_path: Path) -> None:
    made = make(folder, tmp_path, GGMLQuantizationType.Q4_K, None)
    name = "blk.0.ffn_down_exps.weight"
    change_rows(made.path, name, lambda rows: rows[256:512].fill(0))
    stored = "model.layers.0.mlp.experts.1.down_proj.weight"
    (found,) = made.violations(Exactness(), name)
    assert found == f"Q4_K.gguf: {name} expert 1 holds only zeros, which {stored} does not"
    change_rows(made.path, name, lambda rows: np.copyto(rows[256:512], rows[:256]))
    (found,) = made.violations(Exactness(), name)
    assert f"{name} expert 1 differs from {stored} in row 0 by " in found
    assert found.endswith("; it holds the weights of expert 0")
