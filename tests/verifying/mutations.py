"""Changes to a finished bundle that its hashes do not show, since they are made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.sums import hash_folder, write_sums
from tests.conftest import Bundle


def copied(bundle: Bundle, output: Path) -> Bundle:
    """A copy whose files are links to the original's: replace a file, never change it in place."""
    output.mkdir()
    for folder in (bundle.hf, bundle.gguf):
        (output / folder.name).mkdir()
        for file in folder.iterdir():
            (output / folder.name / file.name).hardlink_to(file)
    return Bundle(output, output / bundle.hf.name, output / bundle.gguf.name, bundle.source)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file by a changed copy."""
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(change(raw))


def own(path: Path) -> Path:
    """Make a file of a copy its own, so that it may be changed in place."""
    rewrite(path, lambda raw: raw)
    return path


def fix_hashes(bundle: Bundle) -> None:
    """Make every recorded hash fit the files."""
    manifest = Manifest.load(bundle.gguf)
    files = hash_folder(bundle.hf, 1)
    files.pop(MANIFEST_FILE, None)
    manifest = replace(manifest, hf=replace(manifest.hf, files=files))
    manifest.save(bundle.hf)
    manifest.save(bundle.gguf)
    write_sums(bundle.gguf, 1)


def change_manifest(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of the manifest in both folders, and make SHA256SUMS fit."""
    values = json.loads((bundle.gguf / MANIFEST_FILE).read_text())
    change(values)
    for folder in (bundle.hf, bundle.gguf):
        rewrite(folder / MANIFEST_FILE, lambda _: json.dumps(values).encode())
    (bundle.gguf / "SHA256SUMS").unlink()
    write_sums(bundle.gguf, 1)


def without(folder: Path) -> None:
    """Remove a folder of a copy."""
    shutil.rmtree(folder)
