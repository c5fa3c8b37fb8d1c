"""llama.cpp as oracle: what it computes from the exported files is what transformers computes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from llama_cpp import mtmd_cpp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_side
from reap2gguf.models.deltanet import DeltaNet
from reap2gguf.models.description import Transform, picked
from reap2gguf.models.side_values import side_files
from reap2gguf.models.table import describe
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.exporting.files import export_files, plain, stored
from tests.models.oracles import llama_model, mtp_of_llama_cpp
from tests.tiny import ONE_THREAD, TinyQwen35Moe
from tests.tokens import FULL_VOCAB

TOKENS = np.random.default_rng(3).integers(0, 4000, 200)
LAYOUTS = {
    "eight value heads, MTP": TinyQwen35Moe(vocab=FULL_VOCAB),
    "equal heads, MTP": TinyQwen35Moe(vocab=FULL_VOCAB, value_heads=4, n_kv_heads=2),
    "eight value heads": TinyQwen35Moe(vocab=FULL_VOCAB, mtp=False, fused=False),
    "equal heads, flat": TinyQwen35Moe(vocab=FULL_VOCAB, value_heads=4, mtp=False, nested=False),
    "layers in another order": TinyQwen35Moe(vocab=FULL_VOCAB, layers="lflfl"),
    "four values a key, tied": TinyQwen35Moe(
        vocab=FULL_VOCAB, key_heads=2, nested=False, tied=True, n_shards=2
    ),
}


@dataclass(frozen=True)
class Computed:
    """What transformers' model makes of the tokens, in float32."""

    logits: torch.Tensor  # (T, V)
    hidden: torch.Tensor  # (T, H), after the last norm


def of_transformers(folder: Path) -> Computed:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model.model(torch.from_numpy(TOKENS)[None]).last_hidden_state
        return Computed(model.lm_head(hidden)[0], hidden[0])


def of_llama_cpp(path: Path) -> torch.Tensor:
    """Logits (T, V)."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, verbose=False, **ONE_THREAD
    )
    llama.eval(TOKENS.tolist())
    return torch.tensor(np.array(llama.scores[: len(TOKENS)]))


def mean_kl(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    expected, found = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def export(folder: Path, target: Path, file_type: str) -> Path:
    return export_files(folder, target, [plain(file_type)])[file_type]


def prune(folder: Path, target: Path, keep_mtp: bool = True) -> Path:
    """Keep other experts in every layer."""
    target.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint, keep_mtp)
        kept = {
            layer: tuple(sorted({layer, 7, (layer + 3) % 7, (layer + 5) % 7}))
            for layer in model.facts.moe_layers
        }
        write_pruned(PrunedView(checkpoint, model, kept), target, Silent())
    return target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout].write(tmp_path / "model")
    theirs = of_transformers(folder).logits
    assert theirs.std() > 1
    assert theirs.argmax(-1).unique().numel() > 50
    paths = export_files(folder, tmp_path, [plain("F32"), plain("BF16")])
    assert mean_kl(theirs, of_llama_cpp(paths["F32"])) < 1e-6
    assert mean_kl(theirs, of_llama_cpp(paths["BF16"])) < 1e-3


@pytest.mark.parametrize("keep_mtp", [True, False], ids=["prune", "drop"])
@pytest.mark.parametrize("layout", ["eight value heads, MTP", "four values a key, tied"])
def test_logits_of_pruned_models(layout: str, keep_mtp: bool, tmp_path: Path) -> None:
    folder = prune(LAYOUTS[layout].write(tmp_path / "model"), tmp_path / "pruned", keep_mtp)
    theirs = of_transformers(folder).logits
    paths = export_files(folder, tmp_path, [plain("F32"), plain("BF16")])
    assert mean_kl(theirs, of_llama_cpp(paths["F32"])) < 1e-6
    assert mean_kl(theirs, of_llama_cpp(paths["BF16"])) < 1e-3


@pytest.mark.parametrize("broken", ["heads", "gates", "mixed", "outputs", "decay"])
def test_logits_tell_a_wrong_order_of_the_value_heads(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(DeltaNet, broken).fget

    def wrong(self: DeltaNet) -> Transform:
        untiled = DeltaNet(self.n_value_heads, self.n_value_heads, self.key_dim, self.value_dim)
        if broken == "mixed":
            return picked(slice(None))
        transform: Transform = right(untiled)
        return transform

    folder = TinyQwen35Moe(vocab=FULL_VOCAB, mtp=False).write(tmp_path / "model")
    monkeypatch.setattr(DeltaNet, broken, property(wrong))
    found = of_llama_cpp(export(folder, tmp_path, "F32"))
    assert mean_kl(of_transformers(folder).logits, found) > 1e-3


@pytest.mark.parametrize("mtp", [True, False])
def test_storage_changes_no_byte(mtp: bool, tmp_path: Path) -> None:
    found = []
    for number, (nested, fused, fused_mtp) in enumerate(product([True, False], repeat=3)):
        tiny = TinyQwen35Moe(
            vocab=FULL_VOCAB,
            nested=nested,
            fused=fused,
            fused_mtp=fused_mtp,
            mtp=mtp,
            n_shards=1 + number % 3,
        )
        folder = tiny.write(tmp_path / str(number))
        found.append(stored(export(folder, folder, "BF16")))
    assert all(other == found[0] for other in found[1:])
    assert any(".nextn." in name for name in found[0]) is mtp


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("layout", ["eight value heads, MTP", "four values a key, tied"])
def test_the_mtp_block_predicts_what_llama_cpps_does(
    layout: str, pruned: bool, tmp_path: Path
) -> None:
    folder = LAYOUTS[layout].write(tmp_path / "model")
    if pruned:
        folder = prune(folder, tmp_path / "pruned")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        decoder = StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))
        tokens = torch.from_numpy(TOKENS)[None]
        decoder.load_embedding()
        hidden = decoder.embed(tokens)
        for layer in range(model.facts.n_layers):
            decoder.load_layer(layer)
            hidden = decoder.run_layer(layer, hidden)
        decoder.load_ends()
        decoder.load_layer(model.facts.n_layers)
        ours = decoder.mtp_logits(decoder.run_mtp(hidden, tokens))[0, :-1]
    trunk = of_transformers(folder)
    path = export(folder, tmp_path, "F32")
    theirs = mtp_of_llama_cpp(path, trunk.hidden, TOKENS.tolist(), n_axes=4)
    assert theirs.std() > 1
    assert mean_kl(ours, theirs) < 1e-6
    assert mean_kl(trunk.logits[:-1], theirs) > 0.1


@pytest.mark.parametrize("largest", [1.0, 1e5], ids=["F16", "beyond F16"])
def test_the_projector_loads(tmp_path: Path, largest: float) -> None:
    """llama.cpp also encodes an image while it loads, with every matrix."""
    folder = TinyQwen35Moe(vocab=FULL_VOCAB, vision_hidden=64).write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    matrices = [
        name
        for name, tensor in tensors.items()
        if name.startswith("model.visual.") and tensor.ndim == 2 and "pos_embed" not in name
    ]
    for name in matrices:
        tensors[name][0, 0] = largest
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        (side,) = side_files(model, checkpoint)
        halves = [n for n, kind in side.tensor_types().items() if kind is GGMLQuantizationType.F16]
        frames = ["v.patch_embd.weight", "v.patch_embd.weight.1"]
        assert len(halves) == (2 if largest > 2**16 else 2 + len(matrices))
        assert set(halves) >= set(frames)
        path = tmp_path / "mmproj.gguf"
        export_side(checkpoint, model, HeaderNames("tiny"), path, side, 2, Silent())
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.warmup = False, 2, True
    with llama_model(export(folder, tmp_path, "BF16")) as model:
        context = mtmd_cpp.mtmd_init_from_file(bytes(path), model, params)
        assert context
        assert mtmd_cpp.mtmd_support_vision(context)
        assert mtmd_cpp.mtmd_decode_use_mrope(context)
        mtmd_cpp.mtmd_free(context)
