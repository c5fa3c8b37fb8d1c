"""What the two repositories are to hold: the bundle's files, some changed for where they go.

Cards and manifest name the repositories, hashes follow, and a GGUF file that the Hub does not take
is in parts. Nothing of the bundle is copied or changed: a file that stays as it is is read where it
lies, and one that changes, all of them small, is made in memory. Only parts are written, to the
folder that is given.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reap2gguf.atomic import disk_errors_told, make_folder, remove
from reap2gguf.bundle.bundle_folders import BundleFolders, check_experts
from reap2gguf.bundle.card import CARD_FILE, CardNames, gguf_body, hf_body, join_command
from reap2gguf.bundle.front_matter import front_matter, with_base_model
from reap2gguf.bundle.manifest import (
    MANIFEST_FILE,
    SUMS_FILE,
    FileRecord,
    GgufRecord,
    Manifest,
    hash_file,
)
from reap2gguf.bundle.modelfile import MODELFILE
from reap2gguf.errors import OutputError, UsageError, VerificationError
from reap2gguf.gguf_files.split import HUB_MAX_BYTES, SplitPlan, plan_split, write_part
from reap2gguf.progress import Progress
from reap2gguf.verifying.hashes import HUB_FILES, read_sums

_MAX_TEXT_BYTES = 2**20  # of a card or a Modelfile


@dataclass(frozen=True)
class StagedFile:
    """A file as the repository is to hold it: where it lies, or its bytes."""

    name: str
    content: Path | bytes
    n_bytes: int
    sha256: str  # empty in a dry run where parts that are not written decide it
    changed_ns: int = 0  # when it was last written, where it lies on disk


@dataclass(frozen=True)
class StagedRepo:
    """Everything that a repository is to hold."""

    repo: str
    files: tuple[StagedFile, ...]
    manifest: Manifest

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True)
class Staged:
    """Both repositories, and how files were cut."""

    hf: StagedRepo
    gguf: StagedRepo
    splits: tuple[SplitPlan, ...]

    @property
    def repos(self) -> tuple[StagedRepo, StagedRepo]:
        return self.hf, self.gguf


def stage(
    bundle: BundleFolders,
    repos: CardNames,
    max_bytes: int,
    folder: Path | None,
    progress: Progress,
) -> Staged:
    """Make everything ready to upload; parts go to `folder`, and are only planned if it is None.

    Raises UsageError if a file that cannot be cut is above `max_bytes`, VerificationError if the
    parts together are not the file or a card's front matter cannot be read, OutputError if parts
    cannot be written.
    """
    recorded, _ = read_sums(bundle.gguf)
    plans = _plan(bundle, max_bytes)
    parts = _write_parts(bundle, plans, recorded, folder, progress)
    records = tuple(_split_record(r, plans.get(r.file)) for r in bundle.manifest.gguf)
    manifest = replace(bundle.manifest, gguf=records)
    if folder is not None:
        _check_parts(folder, manifest, plans)
    manifest, hf_files = _hf_files(bundle.hf, manifest, repos)
    changed = {CARD_FILE, MANIFEST_FILE, SUMS_FILE, *plans}
    gguf_files = [*_kept(bundle.gguf, recorded, changed), *parts]
    gguf_files = [_with_joining(file, records) for file in gguf_files]
    front = with_base_model(_card(bundle.gguf), repos.hf)
    gguf_files.append(_text(CARD_FILE, front + gguf_body(manifest, repos)))
    gguf_files.append(_text(MANIFEST_FILE, manifest.text()))
    gguf_files.append(_sums(gguf_files))
    bundle.check_unchanged()  # since its hashes were compared
    return Staged(
        StagedRepo(repos.hf, tuple(hf_files), manifest),
        StagedRepo(repos.gguf, tuple(gguf_files), manifest),
        tuple(plans.values()),
    )


def _hf_files(
    folder: Path, manifest: Manifest, repos: CardNames
) -> tuple[Manifest, list[StagedFile]]:
    """The manifest of both repositories, and the files beside the GGUF ones."""
    hf = manifest.hf
    files = _kept(folder, {name: file.sha256 for name, file in hf.files.items()}, {CARD_FILE})
    files.append(_text(CARD_FILE, _card(folder) + hf_body(manifest, repos)))
    described = {file.name: FileRecord(file.n_bytes, file.sha256) for file in files}
    name = repos.hf.rpartition("/")[2]
    manifest = replace(manifest, hf=replace(hf, folder=name, files=dict(sorted(described.items()))))
    return manifest, [*files, _text(MANIFEST_FILE, manifest.text())]


def _plan(bundle: BundleFolders, max_bytes: int) -> dict[str, SplitPlan]:
    """How each file above the bound is cut, by its name."""
    plans = {}
    for record in bundle.manifest.gguf:
        path = bundle.gguf / record.file
        if not record.parts and path.stat().st_size > max_bytes:
            plans[record.file] = plan_split(path, max_bytes)
    cuttable = {record.file for record in bundle.manifest.gguf}
    for file in sorted([*bundle.hf.iterdir(), *bundle.gguf.iterdir()]):
        whole = file.is_file() and file.name not in plans
        if whole and (size := file.stat().st_size) > HUB_MAX_BYTES:
            advice = "and only a model's GGUF file can be cut"
            if file.name in cuttable:
                advice = f"so leave out --max-file-size, which is {max_bytes:,}"
            raise UsageError(
                f"{file}: has {size:,} bytes, the Hub takes files of at most {HUB_MAX_BYTES:,}, "
                f"{advice}"
            )
    return plans


def _write_parts(
    bundle: BundleFolders,
    plans: Mapping[str, SplitPlan],
    recorded: Mapping[str, str],
    folder: Path | None,
    progress: Progress,
) -> list[StagedFile]:
    """All parts, written and hashed; those of other files or cuts are removed first."""
    if folder is None:
        return [
            StagedFile(part.name, b"", part.n_bytes, "")
            for plan in plans.values()
            for part in plan.parts
        ]
    places = {
        name: folder / f"{recorded[name][:32]}-{len(plan.parts)}-{plan.parts[0].n_bytes}"
        for name, plan in plans.items()
    }
    for stale in sorted(folder.iterdir()) if folder.is_dir() else ():
        if stale.is_dir() and stale not in places.values():
            remove(stale)
    for place in places.values():
        make_folder(place)
    _check_room([place / p.name for n, place in places.items() for p in plans[n].parts], plans)
    found = []
    for name, plan in plans.items():
        total = sum(part.n_bytes for part in plan.parts)
        with progress.task(f"Cutting {name}", total, "bytes") as task:
            for part in plan.parts:
                path, expected = write_part(plan, part, places[name], task)
                found.append(_on_disk(path, hash_file(path).sha256))
                if found[-1].sha256 != expected:
                    remove(path)
                    raise VerificationError(
                        [f"{path}: does not hold the bytes of {plan.header.path}"],
                        "nothing was uploaded; run the same command again",
                    )
    return found


def _check_room(paths: Sequence[Path], plans: Mapping[str, SplitPlan]) -> None:
    """Refuse parts for which the disk has no room, before the first is written."""
    sizes = {part.name: part.n_bytes for plan in plans.values() for part in plan.parts}
    missing = sum(sizes[path.name] for path in paths if not path.is_file())
    if not missing:
        return
    folder = paths[0].parent
    with disk_errors_told(folder):
        free = shutil.disk_usage(folder).free
    if missing > free:
        raise OutputError(
            f"{folder}: the parts of GGUF files take {missing:,} bytes, and {free:,} are free on "
            "that disk; free some, or pass a larger --max-file-size if the Hub takes it"
        )


def _split_record(record: GgufRecord, plan: SplitPlan | None) -> GgufRecord:
    if plan is None:
        return record
    names = tuple(part.name for part in plan.parts)
    return replace(record, parts=names, n_bytes=sum(part.n_bytes for part in plan.parts))


def _check_parts(folder: Path, manifest: Manifest, plans: Mapping[str, SplitPlan]) -> None:
    """See that the parts together have every tensor once and every layer its experts."""
    violations = []
    for record in manifest.gguf:
        if record.file in plans:
            (place,) = (path.parent for path in folder.glob(f"*/{record.first}"))
            violations += check_experts(place, record, manifest.pruning.n_kept)
    if violations:
        raise VerificationError(violations, f"nothing was uploaded; remove {folder} and try again")


def _kept(folder: Path, recorded: Mapping[str, str], changed: set[str]) -> list[StagedFile]:
    """The files that stay as they are."""
    return [
        _on_disk(folder / name, sha256)
        for name, sha256 in sorted(recorded.items())
        if name not in changed | HUB_FILES
    ]


def _on_disk(path: Path, sha256: str) -> StagedFile:
    facts = path.stat()
    return StagedFile(path.name, path, facts.st_size, sha256, facts.st_mtime_ns)


def _text(name: str, text: str) -> StagedFile:
    raw = text.encode("utf-8")
    return StagedFile(name, raw, len(raw), hashlib.sha256(raw).hexdigest())


def _sums(files: Sequence[StagedFile]) -> StagedFile:
    """SHA256SUMS; hashes that a dry run does not know take as much room."""
    lines = [f"{file.sha256 or '0' * 64}  {file.name}\n" for file in files]
    staged = _text(SUMS_FILE, "".join(sorted(lines, key=lambda line: line[66:])))
    return staged if all(file.sha256 for file in files) else replace(staged, sha256="")


def _card(folder: Path) -> str:
    """The front matter that the build wrote, as huggingface_hub reads it too."""
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


def _with_joining(file: StagedFile, records: Sequence[GgufRecord]) -> StagedFile:
    """A Modelfile that says how to join what is cut, for Ollama reads no parts; else the file."""
    if file.name != MODELFILE or not isinstance(file.content, Path):
        return file
    if file.n_bytes > _MAX_TEXT_BYTES:
        return file
    text = file.content.read_text(encoding="utf-8", errors="replace")
    lines = [f"# Ollama reads no parts: {join_command(r)}\n" for r in records if r.parts]
    new = [line for line in lines if line not in text]
    return _text(file.name, "".join(new) + text) if new else file
