"""Checks the safetensors folder of a bundle: members, hashes, facts, and bytes of the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import CARD_FILE, MANIFEST_FILE, gguf_name
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.members import check_members, hf_members, shown_name
from reap2gguf.bundle.sums import check_hf_hashes, folder_bytes
from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.errors import ArtifactError
from reap2gguf.pruning.write import companion_files
from reap2gguf.verifying.facts import check_hf_facts
from reap2gguf.verifying.generated import check_index
from reap2gguf.verifying.hf_folder import check_folder, compare_files, compare_folder
from reap2gguf.verifying.report import Level

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.verifying.context import Check, Opened


def check_hf_files(check: Check, folder: Path) -> Iterator[str]:
    """Violations in the names and hashes of the folder's files."""
    manifest, members = check.manifest, hf_members(check.manifest)
    if folder.is_symlink():
        yield f"{folder.name}: is a link, expected the folder beside {gguf_name(folder.name)}"
    try:
        if Manifest.load(folder) != manifest:
            yield f"{folder.name}: {MANIFEST_FILE} differs from that of the GGUF folder"
    except ArtifactError as error:
        yield str(error)
    for name in sorted(manifest.hf.files.keys() - members):
        yield f"{MANIFEST_FILE}: hf.files names {shown_name(name)}, which no build writes"
    yield from check_members(folder, members)
    title = f"Verifying hashes of {folder.name}"
    with check.progress.task(title, folder_bytes(folder), "bytes") as task:
        yield from check_hf_hashes(folder, manifest, check.n_threads, task.advance)
    check.found.reach(Level.HASHES, (folder / name for name in manifest.hf.files))


def check_hf_contents(check: Check, opened: Opened, view: PrunedView | None) -> Iterator[str]:
    """Violations in what an opened folder holds; `view` is what it must be, if that is known."""
    checkpoint, model = opened
    yield from check_hf_facts(check.manifest, checkpoint, model)
    yield from check_index(checkpoint)
    if not check.strictness.reads_values:
        return
    if view is None:
        yield from check_folder(checkpoint, model, check.progress)
    else:
        yield from _compare(check, checkpoint, model, view)


def _compare(
    check: Check, checkpoint: Checkpoint, model: MoeModel, view: PrunedView
) -> Iterator[str]:
    """Violations against the source: config, every byte of the weights, and the copied files."""
    folder, listed = checkpoint.folder, check.manifest.hf.files.keys()
    yield from compare_folder(checkpoint, view, model, check.progress)
    copies = companion_files(view.folder)
    yield from compare_files(folder, copies)
    names = {file.name for file in copies} | {shard.name for shard in checkpoint.shards}
    names |= {"config.json", INDEX_NAME}
    for name in sorted(listed - names - {CARD_FILE}):
        yield f"{folder.name}: {shown_name(name)} is not a file of the source"
    check.found.reach(Level.EXACT, (folder / name for name in names & listed))
