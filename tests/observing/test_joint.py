"""One sweep gives what the sweep for saliency and the sweep for importance give, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reap2gguf.artifacts.observations import named_layers
from reap2gguf.models.contract import MoeModel
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.joint import JointObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.sweep import Sweep
from reap2gguf.options import Resume
from tests.observing.sweeps import CPU, rows_of, run_sweep
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MODELS = {
    "qwen3": TinyQwen3Moe(),
    "a dense layer last": TinyQwen3Moe(dense_layers=(1,)),
    "qwen3.5 with an MTP block": TinyQwen35Moe(vision=False),
}


def joint_of(model: MoeModel) -> JointObserver:
    return JointObserver(model, SaliencyObserver(model), ImportanceObserver(model))


def arrays(observer: JointObserver) -> dict[str, Any]:
    return {name: np.asarray(values) for name, values in observer.finished_sums().items()}


@pytest.mark.parametrize("model", MODELS)
def test_sums_are_those_of_each_alone(model: str, tmp_path: Path) -> None:
    folder, rows = MODELS[model].write(tmp_path / "model"), rows_of(40, 40, 23, 7)
    saliency, report = run_sweep(SaliencyObserver, folder, rows)
    importance, _ = run_sweep(ImportanceObserver, folder, rows)
    joint, joint_report = run_sweep(joint_of, folder, rows)
    assert joint_report == report
    found, alone = named_layers(joint.saliency.layers), named_layers(saliency.layers)
    assert found.keys() == alone.keys()
    for name, values in alone.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert joint.importance.entries.keys() == importance.entries.keys()
    for name, entry in importance.entries.items():
        np.testing.assert_array_equal(joint.importance.entries[name].sums, entry.sums, name)
        np.testing.assert_array_equal(joint.importance.entries[name].counts, entry.counts, name)


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TinyQwen3Moe(n_layers=3).write(tmp_path / "model")
    rows = rows_of(40, 23)
    whole, _ = run_sweep(joint_of, folder, rows)
    options = replace(CPU, scratch=tmp_path, resume=Resume(tmp_path / "state", "key", {}))
    run_layers = Sweep.run_layers

    def stop(self: Sweep, layers: range, task: Any) -> None:
        if layers[0] == 2:
            raise KeyboardInterrupt
        run_layers(self, layers, task)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "run_layers", stop)
        patch.setattr("reap2gguf.observing.state.MOST_OF_TIME", float("inf"))
        with pytest.raises(KeyboardInterrupt):
            run_sweep(joint_of, folder, rows, options)
    assert (tmp_path / "state").is_file()
    resumed, _ = run_sweep(joint_of, folder, rows, options)
    found, expected = arrays(resumed), arrays(whole)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
