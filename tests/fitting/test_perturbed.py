"""A model some of whose tensors went through a type and back, beside a GGUF file of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import reap2gguf
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting.perturbed import Perturbing
from reap2gguf.gguf_files.imatrix import load_imatrix, save_gguf
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.models.table import describe
from reap2gguf.quantizing.quantizer import load_quantizer
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe


@pytest.mark.parametrize("tiny", [TinyQwen3Moe(), TinyQwen35Moe()])
def test_values_are_those_of_a_file(tiny: TinyQwen3Moe | TinyQwen35Moe, tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "tiny")
    imatrix = tmp_path / "i.gguf"
    save_gguf(random_imatrix(gguf_tensors(model)), imatrix)
    made = reap2gguf.quantize(model, "q5_0", tmp_path / "q.gguf", imatrix=imatrix)
    types = {
        name: Type[one] for name, one in made.tensor_types.items() if one not in ("F32", "BF16")
    }
    with Checkpoint.open(model) as checkpoint:
        described = describe(checkpoint)
        file = GgufWeights(read_whole_header(made.path), described, checkpoint.tensors)
        host = BlockMaker(checkpoint, load_quantizer(0), load_imatrix(imatrix).entries)
        perturbing = Perturbing(host, described)
        found = perturbing.with_types(types)
        chosen = next(name for name in types if "ffn_up_exps" in name)
        one = perturbing.with_types({chosen: types[chosen]})
        changed = 0
        for name in file.tensors:
            values = found.read_float32(name)
            if found.tensors[name].dtype == "F32" and checkpoint.tensors[name].dtype != "F32":
                np.testing.assert_array_equal(values, file.read_float32(name))
            source = checkpoint.read_float32(name)
            changed += not np.array_equal(one.read_float32(name), source)
        tensor = next(t for t in described.gguf_tensors(checkpoint.tensors) if t.name == chosen)
        assert changed == len({slab.stored for slab in tensor.slabs})
        assert one.tensors.keys() == checkpoint.tensors.keys()
