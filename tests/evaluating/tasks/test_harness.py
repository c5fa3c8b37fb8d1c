from __future__ import annotations

import importlib.metadata
import logging
import os
import random
import sys

import numpy as np
import pytest

from reap2gguf.errors import DependencyError
from reap2gguf.evaluating.tasks.harness import check_installed, harness


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DependencyError, match=r"pip install 'reap2gguf\[eval\]'"):
        check_installed()


def test_an_old_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.4.8")
    with pytest.raises(DependencyError, match=r"is 0\.4\.8, expected 0\.4\.13 or newer"):
        check_installed()


def test_an_lm_eval_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with (
        pytest.raises(DependencyError, match="lm-eval cannot be loaded"),
        harness(allows_code=False),
    ):
        raise AssertionError


def test_random_generators_begin_as_in_lm_eval_and_go_on_afterwards() -> None:
    random.seed(7)
    np.random.seed(7)
    expected = random.Random(7).random(), np.random.RandomState(7).random_sample()
    with harness(allows_code=False):
        assert random.random() == random.Random(0).random()
        assert np.random.random_sample() == np.random.RandomState(1234).random_sample()
    assert (random.random(), np.random.random_sample()) == expected


def test_bars_logs_and_bootstraps_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with harness(allows_code=False):
        import lm_eval.api.metrics
        import lm_eval.api.task

        assert list(lm_eval.api.task.tqdm(range(2))) == [0, 1]
        assert list(sys.modules["tqdm"].tqdm(range(2))) == [0, 1]
        logging.getLogger("lm_eval.api.task").error("not shown")
        values = [-1.0, -2.0, -3.0]
        found = lm_eval.api.metrics.bootstrap_stderr(lm_eval.api.metrics.perplexity, values, 100)
        assert found > 0
    assert capfd.readouterr() == ("", "")
    assert lm_eval.api.task.tqdm is sys.modules["tqdm"].tqdm
    assert lm_eval.api.task.tqdm.__name__ == "tqdm"
    assert "print" not in vars(lm_eval.api.metrics)
    assert "DISABLE_MULTIPROC" not in os.environ


def test_templates_run_in_a_sandbox_unless_code_is_allowed() -> None:
    from jinja2.exceptions import SecurityError

    template = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"
    with harness(allows_code=False):
        from lm_eval.utils import apply_template

        assert apply_template("{{ a | regex_replace('b', 'c') }}\n", {"a": "b"}) == "c\n"
        with pytest.raises(SecurityError):
            apply_template(template, {})
    with harness(allows_code=True):
        assert int(apply_template(template, {})) > 0


def test_downloads_are_not_counted() -> None:
    import datasets.config

    earlier = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    with harness(allows_code=False):
        assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is False
    assert earlier == datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
