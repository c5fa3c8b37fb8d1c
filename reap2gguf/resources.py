"""Where recipes, calibration texts and the bundled example lie: in the wheel or a checkout."""

from pathlib import Path

from reap2gguf.errors import SourceError

_PACKAGE = Path(__file__).resolve().parent
EXAMPLE_NAME = "tiny-qwen3-moe"


def shipped_folder(name: str) -> Path:
    """The folder `recipes` or `calibration`: inside an installed wheel, else beside the package."""
    for candidate in (_PACKAGE / "data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise SourceError(
        f"the folder {name!r} is missing from this installation ({_PACKAGE}); reinstall reap2gguf"
    )


def example_checkpoint() -> Path:
    """The bundled example model, found in the checkout that holds the package or is the cwd.

    Raises SourceError in a bare wheel, which does not carry the model.
    """
    for root in (_PACKAGE.parent, Path.cwd()):
        candidate = root / "examples" / EXAMPLE_NAME
        if (candidate / "config.json").is_file():
            return candidate
    raise SourceError(
        "no MODEL was given and the bundled example is not here (it lies in a source checkout, not "
        "in the wheel); pass a folder such as ./Qwen3-30B-A3B or a Hub name such as "
        "Qwen/Qwen3-30B-A3B"
    )
