"""From the arguments of `jobs run` to a request: plan, machine, time limit, command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.layout import gguf_name
from reap2gguf.errors import UsageError
from reap2gguf.jobs.flavors import TABLE_DATE, Flavor, choose, find
from reap2gguf.jobs.request import IMAGE, TOKEN, JobRequest, here_words, package_at, script
from reap2gguf.messages import duration, size

if TYPE_CHECKING:
    from reap2gguf.jobs.needs import Needs

LEAST_SECONDS, MOST_SECONDS = 60, 7 * 24 * 3600
BUCKET = "reap2gguf-work"
_OWNER = "OWNER"  # stands for the account where nobody was asked


@dataclass(frozen=True)
class JobOptions:
    """The options of `jobs run`."""

    flavor: str | None = None
    timeout_seconds: int | None = None
    push: str | None = None
    private: bool = True
    storage: str | None = None  # a bucket; None: OWNER/reap2gguf-work
    stored: bool = True
    ref: str | None = None
    package: str | None = None
    image: str | None = None
    attempts: int = 1


@dataclass(frozen=True)
class Order:
    """A job before it is sent, and what it will take."""

    request: JobRequest
    name: str  # of the bundle
    push: str
    private: bool
    flavor: Flavor
    needs: Needs
    package: str
    is_listed: bool  # whether machine and price are the Hub's, now

    @property
    def repos(self) -> tuple[str, str]:
        """Where the results go."""
        return self.push, gguf_name(self.push)

    @property
    def seconds(self) -> float:
        return self.needs.seconds_on(self.flavor.gpu)

    @property
    def usd(self) -> float:
        return self.flavor.usd(self.needs)

    @property
    def most_usd(self) -> float:
        """The price if the job runs until its time limit."""
        return self.flavor.usd_per_hour * self.request.timeout_seconds / 3600

    def lines(self) -> Iterator[str]:
        """What will be sent, for people."""
        needs, flavor = self.needs, self.flavor
        gpu = f"{size(needs.gpu_memory_bytes)} of GPU memory, " if needs.needs_gpu else ""
        yield (
            f"  needs {gpu}{size(needs.memory_bytes)} of memory, {size(needs.disk_bytes)} of disk"
        )
        price = f"${flavor.usd_per_hour:.2f} per hour"
        dated = "" if self.is_listed else f" (price of {TABLE_DATE})"
        yield f"  machine: {flavor.name}, {hardware(flavor)}, {price}{dated}"
        if lack := flavor.lacks(needs):
            yield f"  warning: the build needs {lack}"
        yield (
            f"  estimate: about {duration(self.seconds)}, ${self.usd:.2f}; ended after "
            f"{duration(self.request.timeout_seconds)} at the latest, ${self.most_usd:.2f}"
        )
        kind = "private" if self.private else "public"
        yield f"  pushes to {' and '.join(self.repos)}, {kind}"
        if self.request.storage:
            yield f"  saves its work in the private bucket {self.request.storage}"
        else:
            yield "  saves no work: a job that is interrupted starts from scratch"
        yield f"  image: {self.request.image}"
        yield f"  package: {self.package}"
        yield f"  secrets: {TOKEN} (your token; its value is not shown)"

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "name": self.name,
            "push": list(self.repos),
            "private": self.private,
            "needs": self.needs.as_json(),
            "estimate": {
                "seconds": round(self.seconds),
                "usd": round(self.usd, 2),
                "most_usd": round(self.most_usd, 2),
                "usd_per_hour": self.flavor.usd_per_hour,
                "prices": "now" if self.is_listed else TABLE_DATE,
            },
            "request": self.request.as_json(),
        }


def hardware(flavor: Flavor) -> str:
    """What a machine has, in one line."""
    gpu = f"{flavor.gpu} with {size(flavor.gpu_bytes)}" if flavor.gpu else "no GPU"
    several = f"{flavor.n_gpus} x " if flavor.n_gpus > 1 else ""
    return (
        f"{several}{gpu}, {size(flavor.memory_bytes)} of memory, {size(flavor.disk_bytes)} of disk"
    )


def make_order(
    options: JobOptions,
    words: Sequence[str],
    files: Mapping[str, bytes],
    name: str,
    needs: Needs,
    flavors: Sequence[Flavor],
    owner: str | None,
    *,
    is_listed: bool,
) -> Order:
    """The job for a build of the bundle `name`.

    `owner` is the account that pays and owns the results; None if nobody was asked. Raises JobError
    if no machine fits, and UsageError for values that are not usable.
    """
    flavor = find(flavors, options.flavor) if options.flavor else choose(flavors, needs)
    timeout = options.timeout_seconds or needs.timeout(flavor.gpu)
    push = options.push or f"{owner or _OWNER}/{name}"
    bucket = (options.storage or f"{owner or _OWNER}/{BUCKET}") if options.stored else None
    package = package_at(options.ref, options.package)
    here = here_words(words, name, push, options.private, options.stored)
    request = JobRequest(
        f"reap2gguf-{name}",
        flavor.name,
        timeout,
        script(package, here, files),
        owner,
        bucket,
        options.image or IMAGE,
        options.attempts,
    )
    return Order(request, name, push, options.private, flavor, needs, package, is_listed=is_listed)


def read_timeout(text: str) -> int:
    """Seconds of "90m", "2h", "1d" or "3600". Raises UsageError for anything else."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = int(float(number) * units[unit])
    except (ValueError, OverflowError):
        seconds = 0
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise UsageError(f"--timeout {text[:40]!r}: expected 1m to 7d, such as 90m or 3h")
    return seconds
