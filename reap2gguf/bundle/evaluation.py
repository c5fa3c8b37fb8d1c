"""What was measured of a model and its variants: the record that commands write and cards show.

A variant is the source checkpoint, the pruned model, or a GGUF file. Every figure that is estimated
from a sample of tokens or of questions has a standard error, which takes them as independent of one
another, as llama-perplexity does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from reap2gguf.atomic import write_whole
from reap2gguf.bundle.estimate import Estimate as Estimate
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, Reap2ggufError
from reap2gguf.messages import shown

EVALUATION_FILE = "evaluation.json"
FORMAT = 1
Kind = Literal["source", "pruned", "gguf"]
Engine = Literal["streamed", "llama.cpp"]
KINDS: tuple[Kind, ...] = ("source", "pruned", "gguf")
ENGINES: tuple[Engine, ...] = ("streamed", "llama.cpp")
_MAX_BYTES = 2**23
_MOST_ENTRIES = 4096  # of a list
_LONGEST_TEXT = 4096  # characters
_LONGEST_PROMPT = 2**20  # characters
_MOST_TOKENS = 2**18  # of a prompt
_MAX_COUNT = 2**63
_T = TypeVar("_T")


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a variant are from those of its reference, over scored tokens.

    KL divergences are of the variant from the reference, in nats: mean and quantiles over tokens.
    """

    mean: Estimate
    median: Estimate
    p90: Estimate  # of 90 % of the tokens it is at most this
    p99: Estimate
    p999: Estimate
    maximum: float
    same_top: Estimate  # share of tokens where both give the same token the highest probability
    rms_probability: Estimate  # root mean square of the difference in the right token's probability
    perplexity_ratio: Estimate  # the variant's perplexity divided by the reference's


@dataclass(frozen=True)
class TextRecord:
    """The text that was scored, and how: as llama-perplexity cuts and scores it."""

    label: str
    sha256: str
    n_tokens: int  # in all chunks
    n_chunks: int
    chunk_size: int
    n_scored: int  # tokens, in the second halves of the chunks
    has_bos: bool  # whether every chunk begins with the token for the beginning of a text


@dataclass(frozen=True)
class VariantRecord:
    """One variant and its perplexity."""

    name: str  # of a GGUF file its file name, else "source" or "pruned"
    kind: Kind
    perplexity: Estimate
    n_experts: int  # per layer
    n_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Comparison:
    """A variant beside its reference; both are names of variants.

    pruned from source: pruning damage; GGUF from pruned: quantizing damage; GGUF from source: what
    a user feels.
    """

    reference: str
    variant: str
    divergence: Divergence


@dataclass(frozen=True)
class TaskScore:
    """How well a variant answers the questions of a task."""

    task: str
    variant: str
    metric: str  # such as acc or acc_norm
    score: Estimate
    n_items: int
    n_shots: int = 0
    group: str = ""  # the group of tasks that this task or group is a part of, if any
    # of what was asked and how it is judged: scores of another one do not compare
    definition: str = ""


@dataclass(frozen=True)
class Speed:
    """How quickly llama.cpp runs a GGUF file on one machine."""

    variant: str
    # pp512: a prompt of 512 tokens; tg128: 128 tokens generated one by one; tg128x4: the same for
    # four sequences at once, whose tokens count together
    test: str
    tokens_per_second: Estimate  # with the standard deviation of repetitions, as of llama-bench
    n_threads: int
    on_gpu: bool
    peak_bytes: int  # of the process


@dataclass(frozen=True)
class Answer:
    """What was read, and what was answered."""

    prompt: str  # the question, as the chat template writes it
    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    text: str


@dataclass(frozen=True)
class SmokeTest:
    """A question, answered greedily by a file in llama.cpp and by its folder in transformers."""

    file: str  # the variant
    question: str
    has_template: bool  # without one, the prompt is the question alone
    llama_cpp: Answer
    transformers: Answer | None  # None: nothing was compared, and `note` says why
    note: str = ""

    @property
    def same_prompt(self) -> bool | None:
        """Whether both read the same tokens; None if nothing was compared."""
        if self.transformers is None:
            return None
        return list(self.llama_cpp.prompt_tokens) == list(self.transformers.prompt_tokens)

    @property
    def n_agree(self) -> int | None:
        """How many first tokens of the answers are the same; None if nothing was compared."""
        if self.transformers is None:
            return None
        pairs = zip(self.llama_cpp.tokens, self.transformers.tokens, strict=False)
        return next(
            (number for number, (one, other) in enumerate(pairs) if one != other),
            min(len(self.llama_cpp.tokens), len(self.transformers.tokens)),
        )

    def __str__(self) -> str:
        if self.transformers is None:
            return f"{self.file}: answers in llama.cpp; not compared with transformers: {self.note}"
        prompt = "the same prompt" if self.same_prompt else "ANOTHER PROMPT"
        longest = max(len(self.llama_cpp.tokens), len(self.transformers.tokens))
        return (
            f"{self.file}: {self.n_agree} of the first {longest} tokens are as in transformers, "
            f"after {prompt}"
        )


@dataclass(frozen=True)
class Evaluation:
    """All that was measured: on a text and tasks, and by other tests.

    `engine` computed GGUF files on the text, or on the tasks if no text was scored; folders are
    always streamed. Without a text there are no records of variants.
    """

    engine: Engine
    text: TextRecord | None  # None: only tasks, speeds or answers were measured
    variants: Sequence[VariantRecord] = ()
    comparisons: Sequence[Comparison] = ()
    tasks: Sequence[TaskScore] = ()
    speeds: Sequence[Speed] = ()
    smoke_tests: Sequence[SmokeTest] = ()
    device: str = "cpu"  # where it was computed
    dtype: str = "float32"  # in which type
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions of libraries

    def __post_init__(self) -> None:
        # what is read from a file equals what was written
        for name in ("variants", "comparisons", "tasks", "speeds", "smoke_tests"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def variant(self, name: str) -> VariantRecord | None:
        """The record of a variant; None if it was not measured."""
        return next((one for one in self.variants if one.name == name), None)

    def of_kind(self, kind: Kind) -> list[VariantRecord]:
        """All variants of a kind, in their order."""
        return [one for one in self.variants if one.kind == kind]

    def divergence(self, variant: str, reference: str) -> Divergence | None:
        """How far a variant is from a reference; None if they were not compared."""
        for one in self.comparisons:
            if (one.variant, one.reference) == (variant, reference):
                return one.divergence
        return None

    def scores(self, variant: str) -> list[TaskScore]:
        """A variant's scores, in the order of the tasks."""
        return [one for one in self.tasks if one.variant == variant]

    def of_files(self, files: Collection[str]) -> Evaluation | None:
        """The same without GGUF files other than these; None if nothing remains."""
        kept = [one for one in self.variants if one.kind != "gguf" or one.name in files]
        names = {one.name for one in kept} | {"source", "pruned", *files}
        found = replace(
            self,
            variants=kept,
            comparisons=[one for one in self.comparisons if {one.variant, one.reference} <= names],
            tasks=[one for one in self.tasks if one.variant in names],
            speeds=[one for one in self.speeds if one.variant in names],
            smoke_tests=[one for one in self.smoke_tests if one.file in names],
        )
        return found if found.variants or found.tasks or found.speeds else None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, which `evaluation_of` reads."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists, not tuples
        return values

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all. Raises OutputError if the disk fails."""
        values = {"format": FORMAT, **self.as_json()}
        write_whole(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read a file that `save` wrote. Raises ArtifactError if it is something else."""
        try:
            values = read_json(path, _MAX_BYTES)
            if values.pop("format", None) != FORMAT:
                raise ArtifactError(f"{path}: not an evaluation of format {FORMAT}")
            return evaluation_of(values)
        except ArtifactError:
            raise
        except (Reap2ggufError, LookupError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: not a complete evaluation ({shown(error)})") from error


def evaluation_of(values: Mapping[str, Any]) -> Evaluation:
    """An evaluation from plain JSON, as `Evaluation.as_json` makes it.

    Raises KeyError, TypeError or ValueError if a value is missing or none that can be.
    """
    text = values["text"]
    found = Evaluation(
        engine=_one_of(ENGINES, values["engine"]),
        text=None if text is None else _text_record(text),
        variants=[_variant(one) for one in _items(values["variants"])],
        comparisons=[_comparison(one) for one in _items(values["comparisons"])],
        tasks=[_task(one) for one in _items(values["tasks"])],
        speeds=[_speed(one) for one in _items(values["speeds"])],
        smoke_tests=[_smoke_test(one) for one in _items(values.get("smoke_tests", []))],
        device=_text(values["device"]),
        dtype=_text(values["dtype"]),
        made_with={_text(name): _text(one) for name, one in dict(values["made_with"]).items()},
    )
    names = {one.name for one in found.variants}
    named = {one.variant for one in found.comparisons} | {
        one.reference for one in found.comparisons
    }
    if unknown := sorted(named - names):
        raise ValueError(f"compares {shown(unknown[0])}, which is not among its variants")
    return found


def _variant(values: Mapping[str, Any]) -> VariantRecord:
    return VariantRecord(
        _text(values["name"]),
        _one_of(KINDS, values["kind"]),
        _estimate(values["perplexity"]),
        _count(values["n_experts"]),
        _count(values["n_bytes"]),
        _number(values["bits_per_weight"]),
    )


def _text_record(values: Mapping[str, Any]) -> TextRecord:
    return TextRecord(
        _text(values["label"]),
        _text(values["sha256"]),
        _count(values["n_tokens"]),
        _count(values["n_chunks"]),
        _count(values["chunk_size"]),
        _count(values["n_scored"]),
        _flag(values["has_bos"]),
    )


def _comparison(values: Mapping[str, Any]) -> Comparison:
    found = dict(values["divergence"])
    maximum = _number(found.pop("maximum"))
    estimates = {name: _estimate(value) for name, value in found.items()}
    divergence = Divergence(**estimates, maximum=maximum)
    return Comparison(_text(values["reference"]), _text(values["variant"]), divergence)


def _task(values: Mapping[str, Any]) -> TaskScore:
    return TaskScore(
        _text(values["task"]),
        _text(values["variant"]),
        _text(values["metric"]),
        _estimate(values["score"]),
        _count(values["n_items"]),
        _count(values["n_shots"]),
        _text(values["group"]),
        _text(values.get("definition", "")),
    )


def _speed(values: Mapping[str, Any]) -> Speed:
    return Speed(
        _text(values["variant"]),
        _text(values["test"]),
        _estimate(values["tokens_per_second"]),
        _count(values["n_threads"]),
        _flag(values["on_gpu"]),
        _count(values["peak_bytes"]),
    )


def _smoke_test(values: Mapping[str, Any]) -> SmokeTest:
    theirs = values["transformers"]
    return SmokeTest(
        _text(values["file"]),
        _text(values["question"]),
        _flag(values["has_template"]),
        _answer(values["llama_cpp"]),
        None if theirs is None else _answer(theirs),
        _text(values["note"]),
    )


def _answer(values: Mapping[str, Any]) -> Answer:
    return Answer(
        _text(values["prompt"], _LONGEST_PROMPT),
        _tokens(values["prompt_tokens"]),
        _tokens(values["tokens"]),
        _text(values["text"], _LONGEST_PROMPT),
    )


def _tokens(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MOST_TOKENS:
        raise TypeError(f"{shown(values)} is not a list of at most {_MOST_TOKENS:,} tokens")
    return tuple(_count(value) for value in values)


def _items(values: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(values, list) or len(values) > _MOST_ENTRIES:
        raise TypeError(f"{shown(values)} is not a list of at most {_MOST_ENTRIES:,} records")
    return values


def _estimate(values: Any) -> Estimate:
    if not isinstance(values, dict) or values.keys() != {"value", "error"}:
        raise TypeError(f"{shown(values)} is not a figure with its standard error")
    return Estimate(_number(values["value"]), _number(values["error"]))


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{shown(value)} is not a number")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise TypeError(f"{shown(value)} is not a count")
    return value


def _text(value: Any, longest: int = _LONGEST_TEXT) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise TypeError(f"{shown(value)} is not a short text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{shown(value)} is not true or false")
    return value


def _one_of(choices: Sequence[_T], value: Any) -> _T:
    if value not in choices:
        raise ValueError(f"{shown(value)} is none of {', '.join(map(str, choices))}")
    return cast(_T, value)
