"""Find recipes, calibration texts and the bundled example, in a wheel or a checkout."""

from pathlib import Path

from reap2gguf.errors import SourceError

_PACKAGE = Path(__file__).resolve().parent
EXAMPLE_NAME = "tiny-qwen3-moe"


def shipped_folder(name: str) -> Path:
    """The folder `recipes` or `calibration`, inside an installed wheel or beside the package.

    Raises SourceError if it is missing.
    """
    for candidate in (_PACKAGE / "data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise SourceError(
        f"the folder {name!r} is missing from this installation ({_PACKAGE}); reinstall reap2gguf"
    )


def example_checkpoint() -> Path:
    """The folder of the bundled example, in the checkout of the package or in the current folder.

    Raises SourceError if there is none: a wheel does not contain the model.
    """
    for root in (_PACKAGE.parent, Path.cwd()):
        candidate = root / "examples" / EXAMPLE_NAME
        if (candidate / "config.json").is_file():
            return candidate
    raise SourceError(
        "no MODEL was given, and there is no bundled example (a source checkout has it, a wheel "
        "does not); pass a folder such as ./Qwen3-30B-A3B or a Hub name such as Qwen/Qwen3-30B-A3B"
    )
