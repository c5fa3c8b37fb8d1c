"""Types of tensors are those that llama.cpp chooses, for every architecture and file type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.resolve import resolve
from tests.exporting.files import (
    export_files,
    mean_squares,
    plain,
    random_imatrix,
    types_of_llama_cpp,
)
from tests.models.layouts import FIRST, Case, every_family

# of an MTP block: matrices that llama-imatrix never sees
_UNWEIGHTED = (".nextn.embed_tokens.weight", ".nextn.shared_head_head.weight")
# by architecture, or by the name of its record: what makes rows of a tiny checkpoint fill blocks of
# 256 where real ones do
WIDE: dict[str, dict[str, Any]] = {
    architecture: sizes
    for family in every_family()
    for architecture, sizes in getattr(family, "WIDE", {}).items()
}


COUNTS = [8, pytest.param(16, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]


@pytest.mark.parametrize("n_experts", COUNTS)
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_types_are_those_llama_cpp_chooses(case: Case, n_experts: int, tmp_path: Path) -> None:
    sizes = {"hidden": 256, "width": 512, "n_experts": n_experts} | WIDE.get(case.record, {})
    folder = replace(case.tiny, **sizes).write(tmp_path / "model")
    bf16 = export_files(folder, tmp_path, [plain("BF16")])["BF16"]
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
    importance = mean_squares(random_imatrix(tensors))
    for name, mixture in MIXTURES.items():
        if name == "NVFP4":
            continue  # llama-quantize does not make it
        resolved = resolve(plain(name), tensors, model.facts, n_experts, True)
        ours = {one: kind.name for one, kind in resolved.tensor_types().items()}
        theirs = types_of_llama_cpp(bf16, mixture.file_type, importance)
        assert ours.keys() == theirs.keys()
        differ = {one for one, kind in theirs.items() if ours[one] != kind}
        if resolve(plain(name), tensors, model.facts, n_experts, False).needs_importance():
            # matrices of which no importance is measured: llama.cpp would refuse the file
            differ -= {one for one in differ if one.endswith(_UNWEIGHTED)}
        assert not differ, name
