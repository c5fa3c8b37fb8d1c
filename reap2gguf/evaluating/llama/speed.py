"""How quickly llama.cpp runs a file, measured as llama-bench does.

Tokens are drawn at random. A test is repeated, after one run that is not timed
(https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from reap2gguf.bundle.evaluation import Estimate, Speed
from reap2gguf.errors import ParameterError, UsageError
from reap2gguf.evaluating.llama.model import LlamaModel, LlamaOptions

if TYPE_CHECKING:
    from reap2gguf.progress import Progress, Task

_MOST_ROWS = 256  # LLAMA_MAX_SEQ
_MOST = 2**20


@dataclass(frozen=True)
class SpeedOptions:
    """Which tests; the defaults are llama-bench's, and generation for several users at once."""

    prompts: tuple[int, ...] = (512,)  # tokens
    generated: tuple[int, ...] = (128,)  # tokens per sequence
    batches: tuple[int, ...] = (1, 4, 8, 16)  # sequences that are generated at the same time
    repetitions: int = 5

    def tests(self) -> list[SpeedTest]:
        """All tests. Raises UsageError for numbers that llama.cpp does not take."""
        numbers = (*self.prompts, *self.generated)
        if not all(1 <= one <= _MOST for one in numbers):
            raise UsageError(f"tokens of a test of speed are {numbers}, expected 1 to {_MOST:,}")
        if not all(1 <= one <= _MOST_ROWS for one in self.batches):
            raise ParameterError(
                f"batches are {self.batches}, expected 1 to {_MOST_ROWS} sequences", "batches"
            )
        if not 2 <= self.repetitions <= _MOST:
            raise ParameterError(
                f"repetitions are {self.repetitions}, expected 2 to {_MOST:,}", "repetitions"
            )
        found = [SpeedTest(f"pp{one}", one, 0, 1) for one in self.prompts]
        for n in self.batches:
            found += [
                SpeedTest(f"tg{one}" if n == 1 else f"tg{one}x{n}", 0, one, n)
                for one in self.generated
            ]
        return found


@dataclass(frozen=True)
class SpeedTest:
    """One test: a prompt is read, or some sequences are continued token by token."""

    name: str
    n_prompt: int
    n_generated: int  # tokens of each sequence
    n_rows: int  # sequences

    @property
    def n_tokens(self) -> int:
        """Tokens of one repetition."""
        return self.n_prompt or self.n_generated * self.n_rows


def measure_speed(
    path: Path,
    options: LlamaOptions,
    progress: Progress,
    speed: SpeedOptions | None = None,
) -> list[Speed]:
    """The speed of a file in each test, in tokens of all sequences per second.

    Each is a mean and a standard deviation of the repetitions. Every test has a process of its own,
    so that its peak memory is that of the test: resident host memory, pages of the file included,
    and about 60 MiB of Python. Raises ArtifactError if the file is broken or llama.cpp fails on it,
    UsageError for options that llama.cpp does not take, and DependencyError if llama-cpp-python
    does not load.
    """
    speed = speed or SpeedOptions()
    tests = speed.tests()
    total = sum(test.n_tokens for test in tests) * speed.repetitions
    with progress.task(f"Speed of {path.name}", total, "tokens") as task:
        return [_measured(path, test, speed.repetitions, options, task) for test in tests]


def _measured(
    path: Path, test: SpeedTest, repetitions: int, options: LlamaOptions, task: Task
) -> Speed:
    request = {
        "do": "speed",
        "test": {
            "n_prompt": test.n_prompt,
            "n_generated": test.n_generated,
            "n_rows": test.n_rows,
            "repetitions": repetitions,
        },
    }
    task.at(test.name)
    rates = []
    with LlamaModel(path, options) as model:
        for answer in model.answers(request):
            rates.append(test.n_tokens / answer["seconds"])
            task.advance(test.n_tokens)
    rate = Estimate(mean(rates), stdev(rates))
    return Speed(path.name, test.name, rate, options.threads, model.on_gpu, model.peak_bytes)
