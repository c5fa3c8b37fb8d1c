"""`add`: more GGUF files for a finished bundle, without the model that it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.building.adding import Addition, extend, open_reference, record_name
from reap2gguf.building.adopting import Adopted, adopt
from reap2gguf.building.bundle_files import is_changed
from reap2gguf.building.exact import is_always_exact
from reap2gguf.building.finished import Inputs
from reap2gguf.building.keys import recipe_key
from reap2gguf.building.needs.room import check_device
from reap2gguf.building.stage import BuildResult
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.layout import GGUF_SUFFIX
from reap2gguf.bundle.opening import open_bundle
from reap2gguf.errors import RecipeError, UsageError, VerificationError
from reap2gguf.messages import one_line, shell_word
from reap2gguf.quantizing.labels import twice
from reap2gguf.quantizing.recipe import load_recipes
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from reap2gguf.verifying.opening import open_source

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, Manifest
    from reap2gguf.options import AddOptions
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.named import RecipeText
    from reap2gguf.verifying.context import Reference


def add(options: AddOptions, progress: Progress) -> BuildResult:
    """Write and adopt files; those with a name that is there already replace it.

    A file whose recipe has not changed is not written again. Raises UsageError if it is not a
    bundle, or if a GPU is asked for and there is none, RecipeError, and what `adopt` and `extend`
    raise; then the bundle is as it was.
    """
    check_device(options.compute)
    recover(options.bundle)
    opened = open_bundle(options.bundle)
    if opened.hf is None and options.source is None:
        label = shell_word(one_line(opened.manifest.source.label))
        raise UsageError(
            f"{options.bundle}: has no safetensors to make files from; pass the model that it was "
            f"made from, such as --source {label}"
        )
    # beside a bundle without safetensors, the folder of that name may be the source itself
    work = Workdir(opened.folders.output, opened.folders.name, opened.hf is not None)
    with work.locked():
        work.finish_interrupted()
        manifest = open_bundle(options.bundle).manifest
        with _opened(options.source, work, manifest, progress) as reference:
            return _add(options, work, manifest, reference, progress)


def recover(bundle: Path) -> None:
    """Finish what was killed while the folders of this bundle got their final names."""
    folder = Path(os.path.realpath(bundle))
    for name in dict.fromkeys((folder.name, folder.name.removesuffix(GGUF_SUFFIX))):
        work = Workdir(folder.parent, name)
        if name and work.is_interrupted:
            with work.locked():
                work.finish_interrupted()


@contextmanager
def _opened(
    source: str | None, work: Workdir, manifest: Manifest, progress: Progress
) -> Iterator[Reference]:
    """The weights to make files from: the bundle's own safetensors, or else its source."""
    if manifest.hf is not None or source is None:
        with open_reference(manifest, work.final_hf) as reference:
            yield reference
        return
    with open_source(source, progress) as opened:
        pruned = opened.pruned(manifest)
        if pruned.violations or pruned.view is None:
            raise VerificationError(list(pruned.violations), "nothing was added")
        yield pruned.view, pruned.view.model


def _add(
    options: AddOptions,
    work: Workdir,
    manifest: Manifest,
    reference: Reference,
    progress: Progress,
) -> BuildResult:
    finished = work.finished()
    inputs = Inputs("") if finished is None else finished.inputs
    names = [str(path) for path in options.files]
    of_files = {name: label for name, label in options.labels.items() if name in names}
    of_recipes = {n: label for n, label in options.labels.items() if n not in of_files}
    asked = _resolved(options.recipes, of_recipes, manifest, reference)
    # a bundle that was put into the place of another one is not what the record is about
    if finished is not None and is_changed(work, manifest):
        inputs = Inputs("")
    recipes = _new_recipes(asked, work, manifest, progress)
    adopted = [
        adopt(path, of_files.get(str(path)), manifest, reference, options.compute.threads, progress)
        for path in options.files
    ]
    _check_labels(recipes, adopted)
    if not recipes and not adopted:
        return BuildResult.of(work, manifest)
    new = {record_name(manifest, r): recipe_key(r) for r in recipes}
    addition = Addition(
        work.of_addition(),
        manifest,
        recipes,
        adopted,
        stay=_stay(work, manifest, {*new, *(one.record.file for one in adopted)}, progress),
        order=[record.file for record in manifest.gguf],
        inputs=Inputs(inputs.base, {**inputs.recipes, **new}),
        exact=frozenset(r.name for r in recipes if options.exact or is_always_exact(r)),
    )
    return extend(addition, reference, options.compute, progress)


def _resolved(
    names: Sequence[str | RecipeText],
    labels: Mapping[str, str],
    manifest: Manifest,
    reference: Reference,
) -> list[ResolvedRecipe]:
    weights, model = reference
    tensors, facts = model.gguf_tensors(weights.tensors), model.facts
    recipes = [
        resolve(recipe, tensors, facts, facts.n_experts, has_imatrix=manifest.has_imatrix)
        for recipe in load_recipes(names, labels)
    ]
    for recipe in recipes:
        if unweighted := sorted({*recipe.needs_importance()} - model.weighted_matrices()):
            raise RecipeError(
                f"recipe {recipe.name}: {unweighted[0]} needs an importance matrix for its type, "
                f"and that of {manifest.name} has none for it; give it a type of more bits in a "
                "rule"
            )
    return recipes


def _new_recipes(
    asked: Sequence[ResolvedRecipe], work: Workdir, manifest: Manifest, progress: Progress
) -> list[ResolvedRecipe]:
    """The recipes whose files the bundle does not have yet, or has of another recipe."""
    records = {record.file: record for record in manifest.gguf}
    new = []
    for recipe in asked:
        file = record_name(manifest, recipe)
        if _is_same(records.get(file), recipe) and (work.final_gguf / file).is_file():
            progress.note(f"{file}: the bundle has it already")
        else:
            new.append(recipe)
    return new


def _is_same(record: GgufRecord | None, recipe: ResolvedRecipe) -> bool:
    """Whether the file of a recipe was made by the same recipe."""
    if record is None or record.adopted:
        return False
    types = {name: one.name for name, one in recipe.tensor_types().items()}
    made = (record.recipe, record.recipe_source, dict(record.tensors))
    return made == (recipe.name, recipe.source, types)


def _check_labels(recipes: Sequence[ResolvedRecipe], adopted: Sequence[Adopted]) -> None:
    labels = [recipe.label for recipe in recipes] + [one.record.label for one in adopted]
    if same := twice(labels):
        raise UsageError(
            f"two of the new files have the label {' and '.join(map(repr, dict.fromkeys(same)))} "
            "and so the same name; give one of them another with --label"
        )


def _stay(work: Workdir, manifest: Manifest, new: set[str], progress: Progress) -> list[GgufRecord]:
    """The records of the files that stay; a file that was removed by hand is named."""
    stay = []
    lower = {name.lower(): name for name in new}
    for record in manifest.gguf:
        if (other := lower.get(record.file.lower())) is not None:
            if other != record.file:
                raise UsageError(
                    f"{other} and {record.file} of the bundle differ in capitals alone; give the "
                    "new file another label with --label"
                )
            progress.note(f"{record.file} is replaced")
        elif all((work.final_gguf / name).is_file() for name in record.files):
            stay.append(record)
        else:
            progress.note(f"{record.file} was removed from the bundle")
    return stay
