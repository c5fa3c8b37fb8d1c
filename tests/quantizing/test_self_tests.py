"""Kernels are tried once per process and type, whoever asks, and in whichever thread."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from reap2gguf.quantizing import self_tests
from reap2gguf.quantizing.self_tests import self_tests_of
from tests.tiny import REPOSITORY, child_environment


class Kernels:
    """Anything that has an identity."""


def test_each_key_is_tried_once_for_the_same_kernels() -> None:
    one, other, tried = Kernels(), Kernels(), list[str]()

    def attempt(name: str, result: bool) -> bool:
        tried.append(name)
        return result

    for _ in range(2):
        assert self_tests_of(one).passes("Q4_K", lambda: attempt("one", True))
        assert not self_tests_of(one).passes("Q6_K", lambda: attempt("one, Q6_K", False))
        assert not self_tests_of(other).passes("Q4_K", lambda: attempt("other", False))
    assert tried == ["one", "one, Q6_K", "other"]


def test_threads_wait_for_the_first_one() -> None:
    kernels, tried, begun = Kernels(), list[int](), threading.Event()

    def attempt() -> bool:
        begun.wait(5)
        tried.append(threading.get_ident())
        return True

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(self_tests_of(kernels).passes, 0, attempt) for _ in range(8)]
        begun.set()
    assert all(one.result() for one in found)
    assert len(tried) == 1


def test_what_an_attempt_raises_is_not_kept() -> None:
    kernels = Kernels()
    with pytest.raises(ZeroDivisionError):
        self_tests_of(kernels).passes(0, lambda: bool(1 // 0))
    assert self_tests_of(kernels).passes(0, lambda: True)


def test_nothing_is_known_of_kernels_that_are_gone() -> None:
    kernels = Kernels()
    self_tests_of(kernels).passes(0, lambda: True)
    key = id(kernels)
    assert key in self_tests._of
    del kernels
    gc.collect()
    assert key not in self_tests._of


FORKING = """
import os, threading
from reap2gguf.quantizing.self_tests import self_tests_of

class Kernels: pass
kernels, begun, end = Kernels(), threading.Event(), threading.Event()
def attempt():
    begun.set()
    return end.wait(60)
thread = threading.Thread(target=self_tests_of(kernels).passes, args=(0, attempt))
thread.start()
begun.wait(60)
if (child := os.fork()) == 0:  # while another thread holds the lock
    os._exit(7 if self_tests_of(kernels).passes(0, lambda: True) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
end.set()
thread.join()
"""


def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have() -> None:
    child = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING],
        cwd=REPOSITORY,
        env=child_environment({}),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.stdout.strip() == "7"
