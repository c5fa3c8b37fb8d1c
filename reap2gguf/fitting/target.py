"""What size a file is asked to have: in bytes, in bits per weight, or what a GPU has room for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reap2gguf.errors import UsageError
from reap2gguf.messages import size

DEFAULT_CONTEXT = 8192
TABLE, MEASURED = SENSITIVITIES = ("table", "measured")  # how errors of tensors are weighed
DEFAULT_SENSITIVITY = MEASURED
PROBE_CHUNK, PROBE_CHUNKS = 512, 8  # tokens of the rows that "measured" takes, and their number
PROBE_TOKENS = PROBE_CHUNK * PROBE_CHUNKS
MOST_BITS = 16.0
_MOST_BYTES = 2**60
_MOST_CONTEXT = 2**24
# units of file names, the first one that says a size exactly with two decimals
_UNITS = (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6))
_KILO = 1024  # tokens of a context


@dataclass(frozen=True)
class SizeTarget:
    """A size to be met: exactly one of the first three."""

    size: int | None = None  # bytes of the file
    bpw: float | None = None  # bits per weight of its tensors
    card: int | None = None  # bytes of a GPU's memory, which holds the context too
    context: int = DEFAULT_CONTEXT  # tokens, for a card

    def __post_init__(self) -> None:
        """Raises UsageError unless there is one target, and it is a sensible number."""
        given = [one for one in (self.size, self.bpw, self.card) if one is not None]
        if len(given) != 1:
            raise UsageError(
                "pass one of a target size, target bits per weight and a card's memory "
                "(--target-size, --target-bpw, --fit)"
            )
        for name, value in (("--target-size", self.size), ("--fit", self.card)):
            if value is not None:
                _check_whole(name, value, _MOST_BYTES)
        _check_whole("--fit-context", self.context, _MOST_CONTEXT)
        if self.bpw is not None and not (
            isinstance(self.bpw, int | float) and 0 < self.bpw <= MOST_BITS
        ):
            raise UsageError(f"--target-bpw is {self.bpw!r}, expected more than 0, at most 16")

    @classmethod
    def of(
        cls, size: int | None, bpw: float | None, card: int | None, context: int | None
    ) -> SizeTarget | None:
        """A target; None if nothing is asked for. Raises UsageError as above."""
        if context is not None and card is None:
            raise UsageError("--fit-context is the context of --fit; pass --fit, such as 16GB")
        if size is None and bpw is None and card is None:
            return None
        return cls(size, bpw, card, DEFAULT_CONTEXT if context is None else context)

    def within(self, context: int) -> SizeTarget:
        """The same for a model that was trained on so many tokens: it has no larger context."""
        return replace(self, context=min(self.context, context))

    @property
    def label(self) -> str:
        """The end of the file's name, such as FIT-12GiB, FIT-4.25BPW or FIT-16GB-8K."""
        if self.bpw is not None:
            return f"FIT-{self.bpw:.4g}BPW"
        if self.size is not None:
            return f"FIT-{_bytes(self.size)}"
        short = self.context % _KILO == 0
        context = f"{self.context // _KILO}K" if short else str(self.context)
        return f"FIT-{_bytes(self.card or 0)}-{context}"

    @property
    def words(self) -> str:
        """What is asked for, for people."""
        if self.bpw is not None:
            return f"{self.bpw:.4g} bits per weight"
        if self.size is not None:
            return f"a file of {size(self.size)}"
        return f"a GPU of {size(self.card or 0)} and a context of {self.context:,} tokens"


def context_note(target: SizeTarget, most: int) -> str:
    """What is said of a context that was asked for, of a model that has `most` tokens."""
    return (
        f"--fit-context {target.context}: the model was trained on {most:,} tokens, so room is "
        "left for these"
    )


def rounded_down(n_bytes: int) -> int:
    """The largest size up to this one that a file's name can say in a few letters."""
    for _, one in _UNITS[::2]:
        if n_bytes >= one:
            return int(int(100 * n_bytes / one) / 100 * one)
    return n_bytes


def _bytes(n_bytes: int) -> str:
    """A size in few letters, such as 12GiB."""
    for unit, one in _UNITS:
        if n_bytes >= one and int(round(n_bytes / one, 2) * one) == n_bytes:
            return f"{round(n_bytes / one, 2):g}{unit}"
    return f"{n_bytes}B"


def _check_whole(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UsageError(f"{name} is {value!r}, expected a whole number from 1 to {most:,}")
