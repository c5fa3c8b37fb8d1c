"""Compiles all variants of a kernel that Triton is about to try, at the same time.

Triton's autotuner compiles a variant, times it, and takes the next one. flash-linear-attention has
59 variants of six kernels: one after another they took 49 s on a machine of 16 cores
(bench/RESULTS.md). Here the compilers of all variants run beside each other, before the first one
is timed, and each is timed for a few milliseconds instead of 125 (9 s for all 59 became 3). What is
chosen is still what is fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

# Milliseconds for which a variant runs, before it is timed and while it is.
_BEFORE, _TIMED = 2, 10


@contextmanager
def variants_compiled_together(n_threads: int) -> Iterator[None]:
    """Within this, kernels that Triton tunes are compiled by `n_threads` threads.

    Without Triton, or with one before 3.5, which cannot do it, nothing changes.
    """
    try:
        from triton import (  # type: ignore[import-not-found,unused-ignore]
            AsyncCompileMode,
            testing,
        )
        from triton.runtime.autotuner import (  # type: ignore[import-not-found,unused-ignore]
            Autotuner,
        )
    except ImportError:
        yield
        return
    choose = Autotuner.prune_configs

    def compile_chosen(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        """The variants to try, as Triton chooses them, compiled.

        Triton asks for them where it has none yet for the arguments at hand, and then times them.
        """
        variants: list[Any] = choose(self, kwargs)
        options = {name: value for name, value in kwargs.items() if name != "warmup"}
        # a variant that does not compile is left to Triton, which passes over it
        with ThreadPoolExecutor(n_threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for variant in variants:
                self.fn.warmup(*self.nargs.values(), **options, **variant.all_kwargs())
        # triton makes this attribute when it times the first variant
        self.__dict__.setdefault("do_bench", partial(testing.do_bench, warmup=_BEFORE, rep=_TIMED))
        return variants

    Autotuner.prune_configs = compile_chosen
    try:
        yield
    finally:
        Autotuner.prune_configs = choose
