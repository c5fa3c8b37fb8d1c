"""Find recipes, calibration texts and the bundled example, and write the example to a folder.

All three are inside an installed wheel, or beside the package in a checkout.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reap2gguf.atomic import output_errors, remove, rename, write_whole
from reap2gguf.errors import OutputError, SourceError
from reap2gguf.files import open_plain

_PACKAGE = Path(__file__).resolve().parent
EXAMPLE_NAME = "tiny-qwen3-moe"
_SUMS = """
6064cd8136e286940cf24e56405111b892a904d4a7fca57c94c7940e9a5f3597  README.md
94c4c61302befcbb40b130d6a19ae59749dc72bce7317c6690b11ba2fdb2e5d3  chat_template.jinja
5b1bd8c13280803545556a2da3530d351380188598924112baa75ec6fff5778d  config.json
24a5362448ac062620cb094dc748ac293b00c3af397313fefe1c7d8736d174f8  generation_config.json
4dda798ee4e3e02355aa8f29230727a106f0082353b962f7370e1b64b530de53  model-00001-of-00002.safetensors
a0f0a9a5d7460c8fc38b06a2fe188925056e84e82fb23fe2b65c53724d269810  model-00002-of-00002.safetensors
5e2732764c0b9b8630ef44d5d0bb1406ddae359a40311e7b51999adc591d0535  model.safetensors.index.json
d439153809f9e251ab58d98b704ec9a16c2022f63b290993481424878062be14  tokenizer.json
beef349a84cc53ea48339b465e8e2c5e9a629d7c7ee68bd34f1208155987b743  tokenizer_config.json
"""
EXAMPLE_FILES = {name: digest for digest, name in map(str.split, _SUMS.strip().splitlines())}
_REINSTALL = "reinstall reap2gguf"
# the package of each extra that a user may miss later
EXTRAS = {
    "llama": "llama-cpp-python>=0.3.30",
    "serve": "llama-cpp-python[server]>=0.3.30",
    "gpu": "flash-linear-attention>=0.4",
}


def shipped_folder(name: str) -> Path:
    """The folder `recipes`, `calibration` or `examples`, in an installed wheel or a checkout.

    Raises SourceError if it is missing.
    """
    for candidate in (_PACKAGE / "data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise SourceError(
        f"the folder {name!r} is missing from this installation ({_PACKAGE}); {_REINSTALL}"
    )


def install_command(extra: str) -> str:
    """The command that adds what an extra needs to the environment of this program.

    It names the package itself, so it is right wherever reap2gguf came from: a checkout, a git URL,
    a wheel or a registry. pipx and uv keep tools in environments without pip.
    """
    package, environment = shlex.quote(EXTRAS[extra]), Path(sys.prefix)
    if (environment / "pipx_metadata.json").is_file():
        return f"pipx inject reap2gguf {package}"
    if (environment / "uv-receipt.toml").is_file():
        return f"uv pip install --python {shlex.quote(sys.executable)} {package}"
    return f"pip install {package}"


def example_checkpoint() -> Path:
    """The folder of the bundled example. Raises SourceError if this installation lacks it."""
    folder = shipped_folder("examples") / EXAMPLE_NAME
    if missing := next((name for name in EXAMPLE_FILES if not (folder / name).is_file()), None):
        raise SourceError(f"{folder}: the bundled example has no {missing}; {_REINSTALL}")
    return folder


def write_example(folder: Path) -> int:
    """Write the bundled example to a new folder, whole or not at all; the number of its bytes.

    The hash of each file is checked before it is written, and read back from the disk after. The
    largest file is held in memory (15 MB). Raises OutputError if the folder exists or cannot be
    written, SourceError if a file of this installation is missing or damaged.
    """
    source = example_checkpoint()
    with output_errors(folder):
        if os.path.lexists(folder):
            raise OutputError(f"{folder}: exists already; pass another folder or move it away")
    with _new_folder(folder) as unfinished:
        for name, expected in EXAMPLE_FILES.items():
            data = _read(source / name, expected, _REINSTALL)
            write_whole(unfinished / name, data)
            _read(unfinished / name, expected, "check the disk and run the command again")
    return sum((folder / name).stat().st_size for name in EXAMPLE_FILES)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder of another name beside `folder`, which gets its name at the end of the block."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    with output_errors(folder):
        unfinished.mkdir()
    try:
        yield unfinished
        rename(unfinished, folder)
    except BaseException:
        remove(unfinished)
        raise


def _read(path: Path, expected: str, advice: str) -> bytes:
    """The bytes of a file of the example. Raises SourceError if they are not those expected."""
    try:
        with open_plain(path) as file:
            data = file.read()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SourceError(f"{path}: its SHA-256 is {found}, expected {expected}; {advice}")
    return data
