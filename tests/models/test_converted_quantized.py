"""Files in F32 hold what llama.cpp's converter decodes: the same bytes in every tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exporting.files import export_files, plain
from tests.models.converted import contents
from tests.models.converted_quantized import CASES, recorded


def test_records() -> None:
    assert recorded().keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_bytes(name: str, tmp_path: Path) -> None:
    folder = CASES[name].write(tmp_path / "model")
    files = export_files(folder, tmp_path, [plain("F32")])
    found = contents(files["F32"])["tensors"]
    assert {name: tensor[2] for name, tensor in found.items()} == recorded()[name]
