"""lm-eval, imported when it is needed, and kept quiet while it works.

lm-eval prints to stdout, stderr and its log, draws bars, changes variables of the environment and
seeds random generators that it shares with us. Its templates are Jinja without a sandbox, so a
task's file could run any code. `harness` keeps all of this in its block.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from reap2gguf.errors import DependencyError

OLDEST = "0.4.13"
_INSTALL = "run `pip install 'reap2gguf[eval]'`"
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "evaluate", "httpx", "transformers")


def check_installed() -> str:
    """lm-eval's version. Raises DependencyError if it is missing or too old."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    try:
        found = version("lm_eval")
    except PackageNotFoundError as error:
        raise DependencyError(f"tasks need lm-eval, which is not installed; {_INSTALL}") from error
    if Version(found) < Version(OLDEST):
        raise DependencyError(f"lm-eval is {found}, expected {OLDEST} or newer; {_INSTALL}")
    return found


@contextmanager
def harness(*, allows_code: bool) -> Iterator[None]:
    """A block in which lm-eval's modules may be imported and its functions called.

    Nothing is printed or counted on a server meanwhile, and random generators begin with the seeds
    of lm-eval's own command. Templates run in Jinja's sandbox unless code is allowed. Raises
    DependencyError if lm-eval is missing, too old or cannot be loaded.
    """
    check_installed()
    with ExitStack() as stack:
        stack.enter_context(_environment({"DISABLE_MULTIPROC": "1"}))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            stack.enter_context(_silent(logging.getLogger(name)))
        _import()
        for owner, name, value in _replacements(allows_code):
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(_seeded())
        yield


def _import() -> None:
    """Load all of lm-eval that is used, so that later imports change nothing."""
    try:
        import lm_eval.api.metrics
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise DependencyError(f"lm-eval cannot be loaded ({error}); {_INSTALL}") from error


def _replacements(allows_code: bool) -> Iterator[tuple[Any, str, Any]]:
    """Attributes of modules, and what they are meanwhile."""
    import datasets.config
    import lm_eval.api.metrics
    import lm_eval.api.task
    import lm_eval.utils

    datasets.disable_progress_bars()
    no_bar = _without_bar(sys.modules["tqdm"].tqdm)
    yield lm_eval.api.task, "tqdm", no_bar
    yield sys.modules["tqdm"], "tqdm", no_bar  # functions import it from there when they are called
    yield lm_eval.api.metrics, "print", _print_nothing  # hides the built-in one
    yield datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False
    if not allows_code:
        from jinja2.sandbox import SandboxedEnvironment

        found = lm_eval.utils.env
        sandbox = SandboxedEnvironment(
            undefined=found.undefined, keep_trailing_newline=found.keep_trailing_newline
        )
        sandbox.filters.update(found.filters)
        yield lm_eval.utils, "env", sandbox


def _without_bar(bar: Any) -> type[Any]:
    """A bar that is not drawn. A module that is loaded meanwhile may keep it."""

    class NoBar(bar):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    return NoBar


def _print_nothing(*_: Any, **__: Any) -> None:
    """Ignored."""


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    earlier = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if earlier is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, earlier)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables; at the end, all that were set meanwhile are as before."""
    earlier = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - earlier.keys():
            del os.environ[name]
        os.environ.update(earlier)


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _seeded() -> Iterator[None]:
    """Tasks shuffle choices and examples with the generators that all modules share."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    plain, numpys = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpys)
