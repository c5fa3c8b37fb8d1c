"""A coverage-guided run of a reader: `python -m tests.fuzz.run TARGET [CORPUS...] [-OPTION=N...]`.

Options are libFuzzer's; `-runs`, `-max_len`, `-rss_limit_mb` and `-timeout` have defaults here. An
input that crashes the reader is written to the working folder.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["reap2gguf"]):
    from tests.fuzz.mutate import MUTATORS
    from tests.fuzz.targets import TARGETS, run

DEFAULTS = {"-runs": "100000", "-max_len": "4096", "-rss_limit_mb": "1024", "-timeout": "10"}
CORPUS = Path(__file__).resolve().parent / "corpus"


def main() -> None:
    """Fuzz the target that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: run.py {'|'.join(TARGETS)} [CORPUS...] [-runs=N] [-seed=S] ...")
    name, *words = sys.argv[1:]
    given = {word.partition("=")[0] for word in words}
    options = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in given]
    target, structured = TARGETS[name], MUTATORS[name]
    if all(word.startswith("-") for word in words):
        # libFuzzer keeps what it finds in the first folder, which is not to be the repository's
        kept = Path(tempfile.gettempdir()) / f"reap2gguf-fuzz-{name}"
        kept.mkdir(exist_ok=True)
        words += [str(kept), str(CORPUS / name)]
    descriptor = os.memfd_create("input")
    path = Path(f"/proc/self/fd/{descriptor}")

    def check(content: bytes) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        run(target, path)

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        changed = bytes(atheris.Mutate(content, max_size))
        dice = random.Random(seed)
        return structured(changed, dice)[:max_size] if dice.random() < 0.75 else changed

    atheris.Setup([sys.argv[0], *words, *options], check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
