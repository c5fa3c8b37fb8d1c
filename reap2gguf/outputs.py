"""What a command may write to, checked before the work.

One rule holds for all commands: an output that is there already is refused, unless the user asks to
overwrite it, and a folder is never replaced. An unfinished output has another name, so an
interrupted command goes on. Nothing that a command reads is ever replaced by it: an output that is
also an input would destroy that input, and a mistyped one could replace a file of the model itself.
While a command runs, no other one writes the same output.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from reap2gguf.atomic import (
    check_replaceable,
    entry_kind,
    locked,
    output_errors,
    part_of,
    remove,
)
from reap2gguf.errors import OutputError, UsageError
from reap2gguf.machine import processes
from reap2gguf.options import check_bool, check_path

_JOURNAL, _STATE = ".journal", ".state"  # progress, beside the output
_WEIGHTS = (".gguf", ".safetensors")  # of which the later parts of a model are not named
_OUTPUT_ENDINGS = (".gguf", ".dat", ".safetensors")  # of the files that commands write


def output_path(path: object) -> Path:
    """A new file or folder; UsageError or OutputError for one that cannot be written."""
    output = check_path("output", path)
    if not output.name:
        raise UsageError(f"output {str(path)!r}: expected the name of a file or folder")
    with output_errors(output):
        is_there = output.parent.is_dir()
        if is_there:
            entry_kind(output)
    if not is_there:
        raise OutputError(f"{output}: the folder {output.parent} does not exist; create it first")
    return output


def output_file(path: object) -> Path:
    """A file that is new, or replaces a file or link; OutputError if anything else lies there.

    Whether it may replace one is for `claimed` to say.
    """
    output = output_path(path)
    check_replaceable(output)
    return output


@contextmanager
def claimed(outputs: Iterable[Path | None], overwrite: bool = False) -> Iterator[None]:
    """Keep every other process from writing the outputs while the context is open; None is none.

    Of several processes of one run the first one does it for all. Raises OutputError if another
    process writes one of them, or if one exists and is not to be overwritten.
    """
    check_bool("overwrite", overwrite)
    with ExitStack() as stack:
        given = [output for output in outputs if output is not None]
        for output in given if processes().is_first else ():
            stack.enter_context(alone(output))
            check_new(output, overwrite)
        yield


def check_new(output: Path, overwrite: bool = False) -> None:
    """Raise OutputError if an output exists: a folder always, anything else unless `overwrite`."""
    if not os.path.lexists(output):
        return
    if output.is_dir() and not output.is_symlink():
        raise OutputError(
            f"{output}: exists already, and a folder is never replaced; pass another output or "
            "move it away"
        )
    if not overwrite:
        raise OutputError(
            f"{output}: exists already; pass another output, or --overwrite to replace it"
        )


def alone(output: Path) -> AbstractContextManager[None]:
    """Keep every other process from writing an output, by a hidden file beside it."""
    return locked(
        output.with_name(f".{output.name}.lock"),
        output,
        lambda process: (
            f"{output}: another command is writing it (process {process}); wait for it, or pass "
            "another output"
        ),
    )


def keep_inputs(outputs: Iterable[Path], inputs: Sequence[Path], folder: Path) -> None:
    """Raise UsageError if writing the outputs would replace an input, or a file of the model.

    `folder` is the model's; its weights are among the inputs. The files of progress beside an
    output count as well.
    """
    own = _places(folder)
    for output in outputs:
        for file in inputs:
            if _is_replaced(file, output):
                raise UsageError(
                    f"output {output}: writing it would replace the input {file}; pass another "
                    "output"
                )
        is_inside = any(os.path.realpath(parent) in own for parent in _real(output).parents)
        if is_inside and os.path.lexists(output) and output.suffix not in _OUTPUT_ENDINGS:
            raise UsageError(
                f"output {output}: writing it would replace a file of the model {folder}; pass "
                "another output"
            )


def result_file(path: object, models: Iterable[str | Path], text: str | None) -> Path:
    """A file of figures about `models`, which are files, folders or names on the Hub.

    Raises UsageError if it would replace one of them, weights that lie there, or the file of the
    text that is scored; and what `output_file` raises.
    """
    output = output_file(path)
    for model in (os.path.expanduser(os.fspath(one)) for one in models):
        inside = os.path.isdir(model) and os.path.isfile(os.path.join(model, output.name))
        if _is_same(output, Path(model, output.name) if inside else Path(model)):
            raise UsageError(
                f"output {output}: it is a file of the model {model}; pass another output"
            )
    if output.suffix in _WEIGHTS and output.exists():
        raise UsageError(
            f"output {output}: writing it would replace a file of a model; pass another output"
        )
    if text is not None and _is_replaced(Path(text).expanduser(), output):
        raise UsageError(
            f"output {output}: writing it would replace the text {text}; pass another output"
        )
    return output


def _real(path: Path) -> Path:
    """Where a name lies: links to its folder are followed, and the name itself is not."""
    return Path(os.path.realpath(path.parent), path.name)


def _places(path: Path) -> set[str]:
    return {str(_real(path)), os.path.realpath(path)}


def _is_replaced(file: Path, output: Path) -> bool:
    """Whether a file lies at an output, or at a name beside it that is written or removed."""
    for written in _written(output):
        if str(_real(written)) in _places(file) or _is_same(written, file):
            return True
    state = f"{_real(output)}{_STATE}"
    return any(
        place.startswith(state) and "/" not in place[len(state) :] for place in _places(file)
    )


def _written(output: Path) -> Iterator[Path]:
    yield output
    yield part_of(output)
    yield output.with_name(f"{output.name}{_JOURNAL}")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # one of them is missing


def drop_states(output: Path) -> None:
    """Remove the saved progress of a sweep, now that its result is written."""
    for file in output.parent.glob(f"{glob.escape(output.name)}{_STATE}*"):
        remove(file)
