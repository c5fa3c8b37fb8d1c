"""Prepares the contents of the repositories from a bundle.

Cards and manifest name the repositories, SHA256SUMS follows, and a GGUF file that is too large for
the Hub is cut into parts. The bundle itself is neither copied nor changed: an unchanged file is
uploaded from where it is, and a changed one (all of them are small) is made in memory. Only parts
are written, to a folder of the push.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.atomic import make_folder, output_errors, remove
from reap2gguf.bundle.card import gguf_body, hf_body
from reap2gguf.bundle.card_files import recommends_sampling
from reap2gguf.bundle.front_matter import front_matter, published_front_matter
from reap2gguf.bundle.layout import CARD_FILE, HUB_FILES, MANIFEST_FILE, MODELFILE, SUMS_FILE
from reap2gguf.bundle.manifest import FileRecord, GgufRecord, Manifest, hash_file
from reap2gguf.bundle.modelfile import with_join_commands
from reap2gguf.bundle.sampling import read_sampling
from reap2gguf.bundle.sums import compose_sums, read_sums
from reap2gguf.errors import OutputError, UsageError, VerificationError
from reap2gguf.gguf_files.split import SplitPlan, plan_split, write_part
from reap2gguf.publishing.contents import HUB_MAX_BYTES, PreparedFile, PreparedPush, PreparedRepo
from reap2gguf.verifying.gguf_file import check_experts

if TYPE_CHECKING:
    from reap2gguf.bundle.card_files import CardNames
    from reap2gguf.bundle.manifest import FolderRecord
    from reap2gguf.bundle.opening import OpenBundle
    from reap2gguf.progress import Progress

_MAX_TEXT_BYTES = 2**20  # of a card or a Modelfile


def prepare(
    bundle: OpenBundle,
    names: CardNames,
    max_bytes: int,
    folder: Path | None,
    progress: Progress,
) -> PreparedPush:
    """Everything that a push uploads; parts are written to `folder`, or only planned if None.

    Raises UsageError if a file that cannot be cut is larger than `max_bytes`, VerificationError if
    the parts together differ from the file or a card's front matter cannot be read, OutputError if
    parts cannot be written.
    """
    hashes, _ = read_sums(bundle.gguf)
    plans = _plan_splits(bundle, max_bytes)
    parts = _planned_parts(plans)
    if folder is not None:
        parts = _write_parts(plans, hashes, folder, progress)
    records = tuple(_with_parts(r, plans.get(r.file)) for r in bundle.manifest.gguf)
    manifest = replace(bundle.manifest, gguf=records)
    if folder is not None:
        _check_parts(folder, manifest, plans)
    hf = None
    if bundle.hf is not None and manifest.hf is not None:
        manifest, hf_files = _hf_files(bundle.hf, manifest, manifest.hf, names)
        hf = PreparedRepo(names.hf, tuple(hf_files), manifest)
    unchanged = _unchanged_files(bundle.gguf, hashes, {CARD_FILE, MANIFEST_FILE, SUMS_FILE, *plans})
    gguf_files = [_with_join_commands(file, records) for file in unchanged] + parts
    front = published_front_matter(_front_matter(bundle.gguf), manifest, names)
    body = gguf_body(manifest, names, _is_sampling_recommended(bundle))
    gguf_files.append(PreparedFile.of_text(CARD_FILE, front + body))
    gguf_files.append(PreparedFile.of_text(MANIFEST_FILE, manifest.text()))
    gguf_files.append(_sums(gguf_files))
    bundle.check_unchanged()  # since its hashes were compared
    return PreparedPush(
        hf,
        PreparedRepo(names.gguf, tuple(gguf_files), manifest),
        tuple(plans.values()),
    )


def _is_sampling_recommended(bundle: OpenBundle) -> bool:
    """Whether the model's generation config recommends a sampling, as the GGUF card has to say."""
    if bundle.hf is not None:
        return read_sampling(bundle.hf).is_recommended
    # the config is not in the bundle; the card was made from it, and was checked before this
    return recommends_sampling((bundle.gguf / CARD_FILE).read_text("utf-8", errors="replace"))


def _hf_files(
    folder: Path, manifest: Manifest, hf: FolderRecord, names: CardNames
) -> tuple[Manifest, list[PreparedFile]]:
    """The manifest of both repositories, and the files of the safetensors repository."""
    hashes = {name: file.sha256 for name, file in hf.files.items()}
    files = _unchanged_files(folder, hashes, {CARD_FILE})
    card = _front_matter(folder) + hf_body(manifest, names)
    files.append(PreparedFile.of_text(CARD_FILE, card))
    records = {file.name: FileRecord(file.n_bytes, file.sha256) for file in files}
    repo_name = names.hf.rpartition("/")[2]
    hf = replace(hf, folder=repo_name, files=dict(sorted(records.items())))
    manifest = replace(manifest, hf=hf)
    return manifest, [*files, PreparedFile.of_text(MANIFEST_FILE, manifest.text())]


def _plan_splits(bundle: OpenBundle, max_bytes: int) -> dict[str, SplitPlan]:
    """How each GGUF file larger than `max_bytes` is cut, by its name."""
    plans = {}
    for record in bundle.manifest.gguf:
        path = bundle.gguf / record.file
        if not record.parts and path.stat().st_size > max_bytes:
            plans[record.file] = plan_split(path, max_bytes)
    can_be_cut = {record.file for record in bundle.manifest.gguf}
    folders = [bundle.gguf, *([] if bundle.hf is None else [bundle.hf])]
    for file in sorted(file for folder in folders for file in folder.iterdir()):
        is_whole = file.is_file() and file.name not in plans
        if is_whole and (n_bytes := file.stat().st_size) > HUB_MAX_BYTES:
            advice = "only a model's GGUF file can be cut into parts"
            if file.name in can_be_cut:
                advice = f"so pass a smaller --max-file-size than {max_bytes:,}"
            raise UsageError(
                f"{file}: has {n_bytes:,} bytes, the Hub accepts files of at most "
                f"{HUB_MAX_BYTES:,}; {advice}"
            )
    return plans


def _planned_parts(plans: Mapping[str, SplitPlan]) -> list[PreparedFile]:
    """All parts for a dry run: without contents and hashes."""
    return [
        PreparedFile(part.name, b"", part.n_bytes, "")
        for plan in plans.values()
        for part in plan.parts
    ]


def _write_parts(
    plans: Mapping[str, SplitPlan], hashes: Mapping[str, str], folder: Path, progress: Progress
) -> list[PreparedFile]:
    """Write and hash all parts; first remove those of other files and other cuts."""
    part_folders = {
        name: folder / f"{hashes[name][:32]}-{len(plan.parts)}-{plan.parts[0].n_bytes}"
        for name, plan in plans.items()
    }
    for old in sorted(folder.iterdir()) if folder.is_dir() else ():
        if old.is_dir() and old not in part_folders.values():
            remove(old)
    for part_folder in part_folders.values():
        make_folder(part_folder)
    sizes = {part_folders[n] / p.name: p.n_bytes for n, plan in plans.items() for p in plan.parts}
    _check_disk_space(sizes)
    prepared = []
    for name, plan in plans.items():
        total = sum(part.n_bytes for part in plan.parts)
        with progress.task(f"Splitting {name}", total, "bytes") as task:
            for part in plan.parts:
                path, expected = write_part(plan, part, part_folders[name], task)
                prepared.append(PreparedFile.on_disk(path, hash_file(path).sha256))
                if prepared[-1].sha256 != expected:
                    remove(path)
                    raise VerificationError(
                        [f"{path}: does not hold the bytes of {plan.header.path}"],
                        "nothing was uploaded; run the same command again",
                    )
    return prepared


def _check_disk_space(sizes: Mapping[Path, int]) -> None:
    """Raises OutputError if the disk has no room for the parts that are not there yet."""
    missing = sum(n_bytes for path, n_bytes in sizes.items() if not path.is_file())
    if not missing:
        return
    folder = next(iter(sizes)).parent
    with output_errors(folder):
        free = shutil.disk_usage(folder).free
    if missing > free:
        raise OutputError(
            f"{folder}: the parts of GGUF files need {missing:,} bytes, that disk has {free:,} "
            "free; free some space, or pass a larger --max-file-size if the Hub accepts it"
        )


def _with_parts(record: GgufRecord, plan: SplitPlan | None) -> GgufRecord:
    """A record with the parts that its file is cut into."""
    if plan is None:
        return record
    names = tuple(part.name for part in plan.parts)
    return replace(record, parts=names, n_bytes=sum(part.n_bytes for part in plan.parts))


def _check_parts(folder: Path, manifest: Manifest, plans: Mapping[str, SplitPlan]) -> None:
    """Raises VerificationError unless the parts have each tensor once and all experts."""
    violations = []
    for record in manifest.gguf:
        if record.file in plans:
            (first,) = folder.glob(f"*/{record.first}")
            violations += check_experts(first.parent, record, manifest.pruning.n_kept)
    if violations:
        raise VerificationError(violations, f"nothing was uploaded; remove {folder} and try again")


def _unchanged_files(
    folder: Path, hashes: Mapping[str, str], changed: set[str]
) -> list[PreparedFile]:
    """The files that are uploaded as they are."""
    return [
        PreparedFile.on_disk(folder / name, sha256)
        for name, sha256 in sorted(hashes.items())
        if name not in changed | HUB_FILES
    ]


def _sums(files: Sequence[PreparedFile]) -> PreparedFile:
    """SHA256SUMS; in a dry run with zeros for unknown hashes, so that its size is right."""
    text = compose_sums({file.name: file.sha256 or "0" * 64 for file in files})
    sums = PreparedFile.of_text(SUMS_FILE, text)
    return sums if all(file.sha256 for file in files) else replace(sums, sha256="")


def _front_matter(folder: Path) -> str:
    """The front matter of a folder's card; VerificationError if the Hub would refuse it."""
    import yaml
    from huggingface_hub import ModelCard

    path = folder / CARD_FILE
    if not path.is_file() or path.stat().st_size > _MAX_TEXT_BYTES:
        raise VerificationError([f"{path}: missing, or too large for a card"])
    front = front_matter(path.read_text(encoding="utf-8", errors="replace"))
    try:
        ModelCard(front)
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VerificationError(
            [f"{path}: front matter that the Hub refuses ({reason})"]
        ) from error
    return front


def _with_join_commands(file: PreparedFile, records: Sequence[GgufRecord]) -> PreparedFile:
    """A Modelfile with the commands that join the parts, as Ollama reads none; or the file."""
    if file.name != MODELFILE or not isinstance(file.content, Path):
        return file
    if file.n_bytes > _MAX_TEXT_BYTES:
        return file
    text = file.content.read_text(encoding="utf-8", errors="replace")
    new = with_join_commands(text, records)
    return file if new == text else PreparedFile.of_text(file.name, new)
