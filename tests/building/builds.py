"""Small builds, whole and interrupted, and what they made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.building import pipeline, stages
from reap2gguf.building.plan import make_plan
from reap2gguf.building.stage import Stage
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Progress, Silent
from tests.tiny import REPOSITORY

PROSE = REPOSITORY / "calibration" / "prose.txt"


def options(model: Path, output: Path, **changes: Any) -> BuildOptions:
    values: dict[str, Any] = {
        "recipes": ("q8_0",),
        "model": str(model),
        "output": output,
        "calibration": CalibrationOptions(str(PROSE), samples=4, max_length=128),
        "chunk": 128,
        "compute": ComputeOptions(device="cpu"),
        "sensitivity": "table",  # as measured takes a sweep of dozens of variants
    }
    return BuildOptions(**values | changes)


def build(
    model: Path, output: Path, progress: Progress | None = None, **changes: Any
) -> pipeline.BuildResult:
    return pipeline.build(make_plan(options(model, output, **changes)), progress or Silent())


def stop_before_export(model: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that is interrupted when its files are to be written."""

    with monkeypatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            build(model, output)


def stop_while_naming(
    n_renames: int, model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> None:
    """A build that is interrupted when some of its folders have their final names."""
    replace, done = os.replace, []

    def replace_some(source: Any, target: Any) -> None:
        if Path(target).parent == output:
            if len(done) == n_renames:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            build(model, output, **changes)


def stages_reused(result: pipeline.BuildResult) -> dict[str, bool]:
    return {stage.name: stage.reused for stage in result.stages}


def contents(result: pipeline.BuildResult) -> dict[str, bytes]:
    """Every file of a bundle."""
    folders = [one for one in (result.hf_folder, result.gguf_folder) if one is not None]
    files = [file for folder in folders for file in folder.iterdir()]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


def stop_at(patch: pytest.MonkeyPatch, kind: type[Stage[Any]]) -> None:
    """Let builds be interrupted where a stage begins, once all stages before it are done."""
    names = [one.name for one in pipeline.STAGES]

    def stop(self: Stage[Any]) -> Any:
        self.run.joint.wait(names[: names.index(self.name)])
        raise KeyboardInterrupt

    patch.setattr(kind, "compute", stop)


def refuse_at(patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    def stop(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(module, name, stop)
