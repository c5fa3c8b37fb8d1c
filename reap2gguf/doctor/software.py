"""Check packages, libggml and llama.cpp."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from reap2gguf import __version__
from reap2gguf.calibration.spec import shipped_mixes
from reap2gguf.doctor.finding import Finding, State
from reap2gguf.errors import CalibrationError, DependencyError, SourceError
from reap2gguf.local.serving import missing_for_server
from reap2gguf.messages import shown
from reap2gguf.resources import install_command, shipped_folder
from reap2gguf.vendor import PROGRAMS, checkout_folder, find_libggml, find_llama_cpp

_SOURCE = "https://github.com/ggml-org/llama.cpp"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
# requirements if the package has no metadata: a checkout that is not installed
_USUAL = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "datasets",
    "pyarrow",
    "huggingface_hub",
    "jinja2",
    "markupsafe",
    "pyyaml",
    "packaging",
    "click",
    "rich",
    "libggml-python",
)
_USES = {
    "llama-server": "for `serve` with several requests at a time, and with images",
    "llama-cli": "for `chat` without llama-cpp-python",
    "llama-quantize": "this program quantizes by itself",
}


def program() -> Finding:
    """The version of this program."""
    return Finding("reap2gguf", __version__)


def python() -> Finding:
    """The interpreter and the system."""
    return Finding("python", f"{platform.python_version()} on {platform.platform()}")


def required_packages() -> Iterator[Finding]:
    """Each package that reap2gguf requires, and whether its version fits."""
    for requirement in _requirements():
        yield _package(requirement)


def installed(name: str) -> str | None:
    """The version of a package, if it is installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    """What is required without an extra, such as "torch<2.14,>=2.10"."""
    try:
        found = requires("reap2gguf") or []
    except PackageNotFoundError:
        found = []
    return [line.split(";")[0].strip() for line in found if "extra ==" not in line] or list(_USUAL)


def _package(requirement: str) -> Finding:
    match = _NAME.match(requirement)
    name = match[0] if match else requirement
    found = installed(name)
    wanted = requirement.removeprefix(name).strip()
    if found is None:
        return Finding(name, "missing", State.PROBLEM, f"pip install '{requirement}'")
    if wanted and _satisfies(found, requirement) is False:
        return Finding(
            name, f"{found}, expected {wanted}", State.PROBLEM, f"pip install '{requirement}'"
        )
    return Finding(name, found)


def _satisfies(found: str, requirement: str) -> bool | None:
    """Whether a version fits; None if that is unknown."""
    if importlib.util.find_spec("packaging") is None:
        return None
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion, Version

    try:
        return Requirement(requirement).specifier.contains(Version(found), prereleases=True)
    except (InvalidRequirement, InvalidVersion):
        return None


def libggml() -> Finding:
    """The library that quantizes."""
    if installed("gguf") is None or installed("numpy") is None:
        return Finding("libggml", "not loaded: gguf or numpy is missing", State.PROBLEM)
    from reap2gguf.ggml import load_ggml

    try:
        ggml = load_ggml()
    except DependencyError as error:
        return Finding("libggml", "does not load", State.PROBLEM, str(error))
    whose = f"of your llama.cpp, {ggml.path}" if ggml.is_own else f"from the wheel, {ggml.path}"
    return Finding("libggml", f"{ggml.version} {whose}")


def kernels() -> Finding:
    """The compiled quantizers."""
    if installed("gguf") is None or installed("numpy") is None:
        return Finding("kernels", "not loaded: gguf or numpy is missing", State.PROBLEM)
    from reap2gguf.quantizing.kernels.compiled import find_kernels

    found = find_kernels()
    if isinstance(found, str):
        return Finding(
            "kernels", "none: libggml quantizes, about ten times slower", State.ADVICE, found
        )
    return Finding("kernels", f"compiled for {found.target}: quantizing at full speed")


def shipped() -> Finding:
    """The recipes and texts that are included."""
    try:
        recipes = len(list(shipped_folder("recipes").glob("*.toml")))
        folder = shipped_folder("calibration")
        mixes = len(shipped_mixes())
    except (SourceError, CalibrationError) as error:
        return Finding("included files", "incomplete", State.PROBLEM, str(error))
    texts = len(list(folder.glob("*.txt"))) + len(list(folder.glob("*.jsonl")))
    return Finding("included files", f"{recipes} recipes, {texts} calibration texts, {mixes} mixes")


def llama_cpp_python() -> Finding:
    """The package for `chat`, `serve` and `evaluate --engine llama.cpp`, and its server."""
    found = installed("llama-cpp-python")
    if found is None:
        return Finding(
            "llama-cpp-python",
            "not installed",
            State.ABSENT,
            f"not needed to build; for `chat`, `serve` and `evaluate`: {install_command('serve')}",
        )
    if missing_for_server():
        return Finding(
            "llama-cpp-python",
            f"{found}, for `chat` and `evaluate`",
            State.ABSENT,
            "not needed to build; for `serve` without llama-server: " + install_command("serve"),
        )
    return Finding("llama-cpp-python", f"{found}, for `chat`, `serve` and `evaluate`")


def llama_programs() -> Iterator[Finding]:
    """llama.cpp's programs: where they are, and their version."""
    try:
        found = find_llama_cpp()
    except DependencyError as error:
        yield Finding("llama.cpp", "not in the given folder", State.PROBLEM, str(error))
        return
    if found is not None and found.problem:
        yield Finding(
            "llama.cpp", f"found by {found.where}, but does not run", State.ADVICE, found.problem
        )
    version_text = f"{found.version} " if found is not None and found.version else ""
    for name in PROGRAMS:
        path = found.programs.get(name) if found is not None else None
        if path is None:
            advice = f"not needed; {_USES[name]}"
            yield Finding(name, "not found", State.ABSENT, advice)
        else:
            where = found.where if found is not None else ""
            yield Finding(name, f"{version_text}at {shown(str(path))[1:-1]} ({where})")


def vendored() -> Iterator[Finding]:
    """The state of the submodule, if this is a checkout."""
    folder = checkout_folder()
    if folder is None:
        return
    if not (folder / "CMakeLists.txt").is_file():
        is_submodule = (folder.parent.parent / ".gitmodules").is_file()
        way = "submodule update --init --checkout" if is_submodule else f"clone {_SOURCE}"
        yield Finding(
            "vendor/llama.cpp",
            "not checked out",
            State.ABSENT,
            f"not needed; to get it: git {way} vendor/llama.cpp",
        )
    elif (folder / "build" / "bin").is_dir():
        library = "with" if find_libggml(folder) else "without"
        yield Finding("vendor/llama.cpp", f"built, {library} a shared libggml")
    else:
        yield Finding(
            "vendor/llama.cpp",
            "checked out, not built",
            State.ABSENT,
            "not needed; to build it: cmake -S vendor/llama.cpp -B vendor/llama.cpp/build && "
            "cmake --build vendor/llama.cpp/build",
        )
