"""Parts of a build that the user has already: observations, and an importance matrix.

Both are untrusted. Each is read when the plan is made, and compared with the model, so that what
does not fit is refused before any work. A plan holds them in memory until the build ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.artifacts.observations import Observations
from reap2gguf.building.given_alike import check_alike
from reap2gguf.bundle.layout import OBSERVATIONS_FILE
from reap2gguf.bundle.manifest import hash_file
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, load_imatrix
from reap2gguf.gguf_files.imatrix_coverage import ImatrixCoverage, coverage, shapes_of
from reap2gguf.gguf_files.imatrix_fit import cut, fit, n_experts_in, n_experts_of, with_experts
from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
from reap2gguf.messages import one_line, shown
from reap2gguf.pruning.methods import FROM_WEIGHTS, is_from_weights, merges
from reap2gguf.pruning.select import select_experts
from reap2gguf.quantizing.minimum import check_minimum

if TYPE_CHECKING:
    from reap2gguf.artifacts.observed_sums import ObservedSums
    from reap2gguf.bundle.layout import BundleFolders
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.description import GgufTensor, ModelFacts
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.select import Kept, Target
    from reap2gguf.quantizing.resolve import ResolvedRecipe


@dataclass(frozen=True)
class GivenObservations:
    """An observations file: its name and hash for the records, and what it holds."""

    file: str
    sha256: str
    seen: Observations


@dataclass(frozen=True)
class GivenImatrix:
    """A file with an importance matrix, and the matrix in the shapes of the model.

    One of the model before pruning has all its experts, until it is known which ones stay.
    """

    file: str
    sha256: str
    imatrix: Imatrix
    coverage: ImatrixCoverage  # of the model before pruning, if it is of that one
    cut_from: int | None = None  # experts per layer, if there are more than the result has
    left_out: tuple[str, ...] = ()  # entries of tensors that the model does not have
    is_observed: bool = False  # it comes with observations, and is no file of its own

    def of(self, kept: Kept) -> Imatrix:
        """The matrix of the result, which keeps these experts."""
        return self.imatrix if self.cut_from is None else cut(self.imatrix, kept, self.file)

    @property
    def notes(self) -> list[str]:
        """What it covers, and what is done with it."""
        lines = [f"{self.file}: {self.coverage.line}"]
        if self.cut_from is not None:
            lines.append(
                f"{self.file}: is of the model before pruning, with {self.cut_from} experts per "
                "layer; it is cut to those that stay"
            )
        if self.left_out:
            lines.append(
                f"{self.file}: {len(self.left_out):,} entries are left out, such as "
                f"{self.left_out[0]}: the model has no such tensor"
            )
        return lines


def read_observations(
    path: Path, checkpoint: Checkpoint, facts: ModelFacts, target: Target, method: str
) -> GivenObservations:
    """Observations that fit a model. Raises ArtifactError if they are broken or of another model.

    UsageError if nothing is pruned: no observations are needed then.
    """
    if not target.prunes:
        raise UsageError(
            f"--observations {path}: they choose the experts to drop, and all "
            f"{target.n_experts} are kept; leave it out, or pass --compression or --keep-experts"
        )
    check_needs_observations(method, path)
    file, sha256 = _named(path)
    seen = Observations.load(file)
    try:
        check_same_model(seen, checkpoint, str(path))
    finally:
        checkpoint.close()  # a plan holds no open files; a later read opens them again
    try:
        select_experts(seen, method, target, facts)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return GivenObservations(one_line(path.name), sha256, seen)


def check_needs_observations(method: str, given: object | None) -> None:
    """Raise UsageError unless observations are given just where a method reads them."""
    if is_from_weights(method) and given is not None:
        raise UsageError(
            f"--method {method} ranks experts by their weights alone, and --observations were "
            "given; leave one of them out"
        )
    if merges(method) and given is not None:
        raise UsageError(
            f"--method {method} finds in a pass of its own which experts become one, and "
            "--observations were given; leave one of them out"
        )
    if not is_from_weights(method) and not merges(method) and given is None:
        raise UsageError(
            f"--method {method} ranks experts by observations, and none were given; pass "
            "--observations FILE, which `reap2gguf observe` writes, or a method that reads weights "
            f"alone: {' or '.join(FROM_WEIGHTS)}"
        )


def check_same_model(seen: Observations, checkpoint: Checkpoint, where: str) -> None:
    """Raises ArtifactError unless observations were made on this checkpoint.

    For a GGUF file, also on what it was made from, as far as they tell.
    """
    found, expected = seen.model_fingerprint, checkpoint.fingerprint()
    if found != expected and isinstance(checkpoint, GgufCheckpoint):
        check_alike(seen, checkpoint, where)
    elif found != expected:
        raise ArtifactError(
            f"{where}: the observations are of another checkpoint (fingerprint "
            f"{shown(found[:12])}) than {checkpoint.shown} ({expected[:12]!r}); a download from "
            "the Hub and a folder have different ones; run `reap2gguf observe` on this one"
        )


def read_imatrix(
    path: Path,
    tensors: Sequence[GgufTensor],
    n_before: int | None = None,
    mtp_block: int | None = None,
) -> GivenImatrix:
    """An importance matrix that fits the tensors of a model, from a file of either format.

    With `n_before`, it may be of the model before pruning, which has so many experts per layer.
    Raises ArtifactError if it is broken or of another model.
    """
    file, sha256 = _named(path)
    found = _fitted(load_imatrix(file), str(path), tensors, n_before, mtp_block)
    return replace(found, file=one_line(path.name), sha256=sha256)


def imatrix_of(
    seen: Observations,
    sha256: str,
    where: str,
    tensors: Sequence[GgufTensor],
    n_before: int,
    mtp_block: int | None = None,
) -> GivenImatrix:
    """The importance matrix that comes with observations, whose file has this hash.

    Raises ArtifactError, which begins with `where`, if they carry none or one of another model.
    """
    if seen.imatrix is None:
        raise ArtifactError(
            f"{where}: these observations carry no sums for an importance matrix, which "
            "--imatrix-from source needs; make them again with `reap2gguf observe "
            "--imatrix-sums`, or leave --imatrix-from out for a second pass"
        )
    found = _fitted(matrix_of(seen.imatrix, seen.calibration), where, tensors, n_before, mtp_block)
    return replace(found, file=OBSERVATIONS_FILE, sha256=sha256, is_observed=True)


def matrix_of(sums: ObservedSums, dataset: str) -> Imatrix:
    """The importance matrix of observed sums: each row is a chunk of its own."""
    entries = {name: ImatrixEntry(name, one.sums, one.counts) for name, one in sums.entries.items()}
    return Imatrix(entries, dataset, sums.n_chunks, sums.chunk_size)


def given_imatrix(
    options: BuildOptions,
    facts: ModelFacts,
    tensors: Sequence[GgufTensor],
    observations: GivenObservations | None,
) -> GivenImatrix | None:
    """An importance matrix in place of one that would be computed: a file, or of observations.

    Raises what `read_imatrix` and `imatrix_of` raise, and UsageError if no pass would take sums.
    """
    of = facts.n_experts, facts.mtp_layer
    way = f"--method {options.method} ranks the experts by their weights"
    if merges(options.method):
        way = f"--method {options.method} merges experts"
    if options.kept is not None:
        way = "--kept names the experts"
    is_ranked = not (is_from_weights(options.method) or merges(options.method))
    if options.imatrix_from == "source" and (options.kept or not is_ranked):
        raise UsageError(
            f"--imatrix-from source: {way}, in no pass that could take the sums; leave "
            "--imatrix-from out"
        )
    if options.imatrix is not None:
        return read_imatrix(options.imatrix, tensors, *of)
    if observations is None or options.imatrix_from != "source":
        return None
    where = str(options.observations)
    return imatrix_of(observations.seen, observations.sha256, where, tensors, *of)


def check_given_minimum(
    recipes: Sequence[ResolvedRecipe], given: GivenImatrix, kept: Kept | None
) -> None:
    """Raise RecipeError if an importance matrix that is there has less than a recipe asks for.

    One of the model before pruning has more experts than will stay: it is asked when it is known
    which ones (`kept`).
    """
    if given.cut_from is not None and kept is None:
        return
    for recipe in recipes:
        if recipe.asks_importance:
            check_minimum(recipe, given.of(kept or {}), given.file)


def _fitted(
    found: Imatrix,
    where: str,
    tensors: Sequence[GgufTensor],
    n_before: int | None,
    mtp_block: int | None,
) -> GivenImatrix:
    """A matrix in the shapes of a model, or of the model before pruning if it is of that one."""
    shapes = shapes_of(tensors)
    n_found = n_experts_in(found, shapes, where)
    is_whole = n_found is not None and n_found == n_before != n_experts_of(shapes)
    if is_whole and n_found is not None:
        shapes = with_experts(shapes, n_found)
    fitted = fit(found, shapes, where)
    covered = coverage(fitted.imatrix, shapes, mtp_block)
    cut_from = n_found if is_whole else None
    return GivenImatrix(where, "", fitted.imatrix, covered, cut_from, fitted.left_out)


def keep_given(folders: BundleFolders, given: Iterable[Path | None], writes_hf: bool) -> None:
    """Raises UsageError for a given file that the bundle, or the work on it, would replace."""
    made = [folders.gguf, folders.work / folders.name, *([folders.hf] if writes_hf else [])]
    own = {os.path.realpath(one) for one in made}
    for path in given:
        if path is None:
            continue
        places = {os.path.realpath(path), os.path.join(os.path.realpath(path.parent), path.name)}
        if any(str(parent) in own for place in places for parent in Path(place).parents):
            raise UsageError(
                f"{path}: the build of {folders.name} would replace it; copy it to another folder, "
                "or pass another --name or --output"
            )


def _named(path: Path) -> tuple[Path, str]:
    """Where a file that the user named lies, and its hash. Raises ArtifactError without one."""
    file = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        return file, hash_file(file).sha256
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
