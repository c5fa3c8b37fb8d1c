"""The sound bundles that are damaged, made once per process.

Two models: two layers of the bundled, trained example, in several shards; and a Qwen3.5-MoE with a
vision tower and an MTP block, whose norms and head all differ. REAP2GGUF_MUTATION_MODELS names the
folders of further checkpoints, separated as in PATH.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from reap2gguf.building import pipeline, verify_stage
from reap2gguf.building.plan import Plan, make_plan
from reap2gguf.bundle.layout import gguf_name
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.writer import plan_shards
from reap2gguf.models.table import describe
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.write import write_pruned
from tests.part_of_example import part_of_config, part_of_tensors
from tests.tiny import EXAMPLE, REPOSITORY, TinyQwen35Moe, save_sharded

NAME = "sound"
FULL_VOCAB = 4096  # of the example
VOCAB = 512
FAMILIES = ("qwen3", "qwen3.5")
VARIABLE = "REAP2GGUF_MUTATION_MODELS"
_CARD = """\
---
license: apache-2.0
base_model: example/base
tags:
- example
---

# A model

What its makers say of it.
"""
_SAMPLING = {
    "bos_token_id": 4093,
    "do_sample": True,
    "eos_token_id": [4093, 4095],
    "pad_token_id": 4093,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
}


@dataclass(frozen=True)
class Sound:
    """A finished build, the same build stopped before it verifies, and its source."""

    family: str
    source: Path
    output: Path
    stopped: Path
    recipes: tuple[str, ...]
    exact: str
    quantized: str
    projector: str | None
    shard_bytes: int  # of the pruned safetensors

    def build(self, output: Path) -> pipeline.BuildResult:
        """Resume or repeat the build of this bundle in a folder."""
        return _build(self.source, output, self.recipes, self.shard_bytes)

    @property
    def hf(self) -> Path:
        return self.output / NAME

    @property
    def gguf(self) -> Path:
        return self.output / gguf_name(NAME)


def more_models() -> list[Path]:
    """The folders that the environment names."""
    return [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def make(model: str | Path, folder: Path) -> Sound:
    """Build the bundle of one of FAMILIES, or of a checkpoint in a folder."""
    if model == "qwen3":
        source = _part_of_example(folder / "tiny-qwen3")
        return _make(model, source, folder, ("bf16", "unsloth-iq4km"), 3)
    if model == "qwen3.5":
        source = _qwen35(folder / "tiny-qwen3.5")
        return _make(model, source, folder, ("bf16", "q8_0"), 1)
    with Checkpoint.open(Path(model)) as checkpoint:
        fits = describe(checkpoint).facts.hidden_size % 256 == 0
    return _make(
        Path(model).name, Path(model), folder, ("bf16", "unsloth-iq4km" if fits else "q8_0"), 2
    )


def _part_of_example(folder: Path) -> Path:
    """Two layers, half of the experts and the first tokens of the example, all values its own."""
    folder.mkdir()
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    _write_small_files(folder, part_of_config(n_layers=2, n_experts=8))
    tensors = part_of_tensors(n_layers=2, n_experts=8)
    embedding = "model.embed_tokens.weight"
    tensors[embedding] = tensors[embedding][:VOCAB].clone()
    save_sharded(tensors, folder, 2)
    return folder


def _qwen35(folder: Path) -> Path:
    TinyQwen35Moe(layers="lf", vocab=VOCAB, n_shards=2).write(folder)
    _write_small_files(folder, json.loads((folder / "config.json").read_text()))
    (folder / "LICENSE").write_text("Use it as you like.\n")
    return folder


def _write_small_files(folder: Path, config: dict[str, Any]) -> None:
    """Config, tokenizer, sampling and card, for a vocabulary that is quick to read."""
    config = _renumbered(config)
    config.get("text_config", config)["vocab_size"] = VOCAB
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    sampling = json.dumps(_renumbered(_SAMPLING), indent=2)
    (folder / "generation_config.json").write_text(sampling)
    (folder / "README.md").write_text(_CARD)
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text())
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    first = VOCAB - len(added)
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < first}
    model["merges"] = [m for m in model["merges"] if "".join(m) in model["vocab"]]
    for token in added:
        token["id"] += VOCAB - FULL_VOCAB
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


def _renumbered(values: dict[str, Any]) -> dict[str, Any]:
    """JSON in which the ids of the added tokens are those of the small vocabulary."""
    text = json.dumps(values)
    for token in range(FULL_VOCAB - 3, FULL_VOCAB):
        text = re.sub(rf"\b{token}\b", str(token + VOCAB - FULL_VOCAB), text)
    return dict(json.loads(text))


def _build(
    source: Path, output: Path, recipes: tuple[str, ...], shard_bytes: int
) -> pipeline.BuildResult:
    """A whole build, whose safetensors have shards of another size than usual."""
    with (
        patch.object(write_pruned, "__defaults__", (shard_bytes,)),
        patch.object(plan_shards, "__defaults__", (shard_bytes,)),
    ):
        result = pipeline.build(_plan(source, output, recipes), Silent())
    assert result is not None
    return result


@cache
def _plan(source: Path, output: Path, recipes: tuple[str, ...]) -> Plan:
    """The plan of a build; made once per folder, as the source stays and damages come later."""
    options = BuildOptions(
        recipes=recipes,
        model=str(source),
        output=output,
        name=NAME,
        compression=0.25,
        calibration=CalibrationOptions(
            str(REPOSITORY / "calibration" / "prose.txt"), samples=8, max_length=128
        ),
        chunk=128,
        compute=ComputeOptions(device="cpu", threads=1),
    )
    return make_plan(options)


def _stop(stage: verify_stage.Verify) -> None:
    stage.run.joint.wait(["export"])
    raise KeyboardInterrupt


def _make(
    family: str, source: Path, folder: Path, recipes: tuple[str, ...], n_shards: int
) -> Sound:
    """Build up to the verification, keep that, and finish a copy."""
    stopped, output = folder / "stopped", folder / "output"
    stopped.mkdir()
    n_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    with (
        patch.object(verify_stage.Verify, "compute", _stop),
        contextlib.suppress(KeyboardInterrupt),
    ):
        _build(source, stopped, recipes, n_bytes // n_shards)
    shutil.copytree(stopped, output)
    manifest = _build(source, output, recipes, n_bytes // n_shards).manifest
    exact, quantized = (record.file for record in manifest.gguf)
    projector = next((side.file for side in manifest.side_files), None)
    return Sound(
        family, source, output, stopped, recipes, exact, quantized, projector, n_bytes // n_shards
    )
