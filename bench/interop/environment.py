"""Virtual environments of other programs, each with its own packages, kept between runs."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

CACHE = Path.home() / ".cache" / "reap2gguf-interop"


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment with these requirements, made at the first call.

    A changed list of requirements makes it again.
    """
    folder = CACHE / name
    python = folder / "bin" / "python"
    wanted = "\n".join(requirements)
    mark = folder / "requirements.txt"
    if mark.is_file() and mark.read_text() == wanted:
        return python
    print(f"{name}: making the environment in {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    for requirement in requirements:
        # one at a time: a later one may have fewer dependencies than it claims
        _pip(python, "install", *requirement.split())
    mark.write_text(wanted)
    return python


def dependencies_of(requirement: str, without: Sequence[str]) -> list[str]:
    """What a package of this requirement needs on this machine, `without` some packages.

    For packages whose other dependencies cannot be installed here and are not used. Extras of
    dependencies are left out.
    """
    from packaging.requirements import Requirement  # inside an environment there may be none

    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    _pip(Path(sys.executable), "download", "--no-deps", "--dest", str(folder), requirement)
    stem = re.split("[=<>~]", requirement)[0].replace("-", "_")
    wheel = max(folder.glob(f"{stem}-*.whl"), key=lambda path: path.stat().st_mtime)
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    needed = HeaderParser().parsestr(text).get_all("Requires-Dist") or []
    found = [Requirement(one) for one in needed]
    wanted = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [f"{one.name}{one.specifier}" for one in wanted if one.name.lower() not in without]


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)
