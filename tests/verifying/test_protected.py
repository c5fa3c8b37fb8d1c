"""Protected experts in a manifest: recorded, kept, and asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reap2gguf.bundle.manifest import PruningRecord
from reap2gguf.bundle.options_record import OptionsRecord
from reap2gguf.verifying.protected import check_asked, check_protected
from tests.bundle.test_manifest import sample

KEPT = {0: (0, 2, 5), 3: (1, 2, 7)}


def pruning(**changes: object) -> PruningRecord:
    values = {"kept": KEPT, "n_experts": 8, "n_kept": 3, "method": "reap"}
    return replace(sample().pruning, **values | changes)  # type: ignore[arg-type]


def options(**changes: object) -> OptionsRecord:
    found = sample().options
    assert found is not None
    return replace(found, **changes)  # type: ignore[arg-type]


def test_what_fits() -> None:
    one = pruning(protected={0: (2,), 3: (2,)}, super_experts={3: (7,)})
    assert not list(check_protected(one))
    assert not list(check_asked(one, options(protect="*:2", protect_super_experts=True)))
    assert not list(check_asked(pruning(), options()))
    assert not list(check_asked(pruning(), options(protect_super_experts=True)))
    assert not list(check_asked(pruning(method="none"), options(protect="0:1")))


@pytest.mark.parametrize("name", ["protected", "super_experts"])
@pytest.mark.parametrize("where", [{0: (1,)}, {3: (0, 1)}, {1: (0,)}, {0: (8,)}])
def test_experts_that_are_gone(name: str, where: dict[int, tuple[int, ...]]) -> None:
    (layer,) = where
    (violation,) = check_protected(pruning(**{name: where}))
    assert violation.startswith(f"reap2gguf.json: pruning.{name} of layer {layer} names [")


@pytest.mark.parametrize(
    ("protected", "protect", "words"),
    [
        ({}, "0:2", "pruning.protected is {}, expected {0: (2,)}"),
        ({0: (2,)}, "", "pruning.protected is {0: (2,)}, expected {}"),
        ({0: (2,)}, "0:5", "expected {0: (5,)}"),
        ({}, "zero", "options.protect does not fit: --protect 'zero'"),
        ({}, "1:0", "the model has no experts in that layer"),
        ({}, "0:8", "the model has no expert 8"),
    ],
)
def test_what_was_not_asked_for(
    protected: dict[int, tuple[int, ...]], protect: str, words: str
) -> None:
    (violation,) = check_asked(pruning(protected=protected), options(protect=protect))
    assert words in violation


def test_super_experts_that_nobody_asked_for() -> None:
    (violation,) = check_asked(pruning(super_experts={0: (2,)}), options())
    assert "options.protect_super_experts is false" in violation
