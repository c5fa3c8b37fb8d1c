"""How a plan stands to the finished bundle of its name: what of it can stay, what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.building.unchanged import Compared, Hashing, compare
from reap2gguf.bundle.layout import HUB_FILES, IMATRIX_FILE, MANIFEST_FILE, SUMS_FILE, gguf_name
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.members import gguf_members, hf_members
from reap2gguf.errors import ArtifactError, OutputError
from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.building.keys import BuildKeys
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.manifest import GgufRecord
    from reap2gguf.quantizing.resolve import ResolvedRecipe


@dataclass(frozen=True)
class Standing:
    """A finished bundle that was made from the same inputs as a plan, recipes apart."""

    manifest: Manifest
    missing: Sequence[ResolvedRecipe]  # of the plan; the bundle has no such file, or not its bytes
    stay: Sequence[GgufRecord]
    dropped: Sequence[GgufRecord]  # not named by a plan that replaces
    gone: Sequence[str]  # files that somebody has removed from the bundle
    changed: Sequence[str]  # GGUF files with other bytes than were built, which are written again
    n_files: int  # of both folders
    n_hashed: int  # of these, the ones that were read, since their time of change was another

    @property
    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.missing or self.dropped or self.gone or self.changed)


def standing(
    plan: Plan, keys: BuildKeys, work: Workdir, hashing: Hashing | None = None
) -> Standing | None:
    """The finished bundle that a plan only has to extend; None if everything has to be built.

    Files are compared with what was recorded of them, as `unchanged.py` says; without `hashing` by
    their sizes alone. Raises OutputError for a file that was changed and that the plan does not
    write.
    """
    finished = None if plan.options.fresh else work.finished()
    inputs = keys.inputs
    if finished is None or finished.inputs.base != inputs.base:
        return None
    try:
        manifest = Manifest.load(work.final_gguf)
    except ArtifactError:
        return None  # removed or damaged: everything is built
    source, pruning = manifest.source, manifest.pruning
    if (source.fingerprint, pruning.n_kept) != (keys.fingerprint, plan.target.n_kept):
        return None  # another bundle has been put there
    found = compare(work, finished, manifest, hashing)
    if found.hashed:
        work.restamp({name: changed_ns for name, (_, changed_ns) in found.hashed.items()})
    places = {record.file: f"{gguf_name(work.name)}/{record.file}" for record in manifest.gguf}
    if others := sorted((found.missing | found.changed) - set(places.values())):
        if hashing is not None:
            hashing.progress.note(_built_again(work, others[0], found))
        return None
    there = {n for n, place in places.items() if place in finished.stamps and found.has(place)}
    if plan.slices and (others := sorted(places.keys() - there)):
        if hashing is not None:  # no recipe makes the blocks of a GGUF source again
            hashing.progress.note(_built_again(work, places[others[0]], found))
        return None
    made = finished.inputs.recipes
    same = {name for name in there if made.get(name) == inputs.recipes.get(name)}
    changed = sorted(n for n, place in places.items() if place in found.changed)
    _refuse_changed(work, [name for name in changed if name not in inputs.recipes])
    unnamed = [r for r in manifest.gguf if r.file in there - inputs.recipes.keys()]
    kept = [record for record in manifest.gguf if record.file in same]
    return Standing(
        manifest,
        [recipe for recipe in plan.recipes if plan.gguf_name(recipe) not in same],
        kept if plan.options.replace else _in_order([*kept, *unnamed], manifest),
        unnamed if plan.options.replace else (),
        sorted(places.keys() - there - set(changed)),
        changed,
        len(finished.stamps),
        len(found.hashed),
    )


def _built_again(work: Workdir, name: str, found: Compared) -> str:
    what = "is gone" if name in found.missing else "was changed"
    return f"{work.name}: {name} {what} since the bundle was finished; it is built again"


def _refuse_changed(work: Workdir, names: Sequence[str]) -> None:
    """Raise OutputError for a changed file that the build would neither keep nor write."""
    if names:
        raise OutputError(
            f"{work.final_gguf / names[0]}: was changed since the bundle was finished: it has "
            f"another size, or another SHA-256 than {SUMS_FILE} says, and this command does not "
            "write it again; name its recipe too, or move the file away"
        )


def _strays(work: Workdir) -> list[Path]:
    """What lies in the folders of the finished bundle and is not one of its files."""
    try:
        manifest = Manifest.load(work.final_gguf)
    except ArtifactError:
        return []  # without a manifest nothing tells its files from others
    members = {work.final_gguf: gguf_members(manifest)}
    if work.has_hf:
        members[work.final_hf] = hf_members(manifest)
    return [
        entry
        for folder, names in members.items()
        if folder.is_dir()
        for entry in sorted(folder.iterdir())
        if entry.name not in names | HUB_FILES and not entry.name.endswith(".gguf")
    ]


def _in_order(records: Sequence[GgufRecord], manifest: Manifest) -> list[GgufRecord]:
    names = {record.file for record in records}
    return [record for record in manifest.gguf if record.file in names]


def dropped_files(plan: Plan, work: Workdir) -> list[tuple[str, int]]:
    """GGUF files of the finished bundle, with sizes, that a plan does not name."""
    if not (work.final_gguf / MANIFEST_FILE).is_file():
        return []
    named = {plan.gguf_name(recipe) for recipe in plan.recipes} | {IMATRIX_FILE}
    named |= {plan.side_name(side) for side in plan.side_files}
    files = (
        file
        for file in sorted(work.final_gguf.glob("*.gguf"))
        if file.name not in named and file.is_file()
    )
    return [(file.name, file.stat().st_size) for file in files]


def refuse_dropping(plan: Plan, work: Workdir) -> None:
    """Raise OutputError if a build from scratch would delete files that the plan does not name.

    Files that no build has written are never deleted.
    """
    if strays := _strays(work):
        more = f" and {len(strays) - 1:,} more" if len(strays) > 1 else ""
        raise OutputError(
            f"{strays[0]}{more}: no part of the bundle, and the build would replace the folder; "
            "move it away, or pass another --name or --output"
        )
    dropped = dropped_files(plan, work)
    if dropped and not plan.options.replace:
        files = ", ".join(f"{name} ({size(n_bytes)})" for name, n_bytes in dropped)
        raise OutputError(
            f"{work.final_gguf}: {files} would be deleted: this command does not name them, and "
            "builds the bundle from other inputs than theirs; pass --replace to delete them, their "
            "recipes to build them again, or another --name or --output"
        )
