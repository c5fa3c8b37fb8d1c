"""What installing does: objects where they can be compiled, a warning elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reap2gguf.quantizing.kernels import compiling
from reap2gguf.quantizing.kernels.build_hook import KernelsHook

PLACE = Path("reap2gguf", "quantizing", "kernels")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the sources of the kernels alone."""
    folder = tmp_path / PLACE
    folder.mkdir(parents=True)
    shutil.copytree(compiling.SOURCE, folder / "source")
    shutil.copy(Path(compiling.__file__), folder)
    return tmp_path


def run(root: Path, target: str = "wheel") -> tuple[dict[str, Any], list[str]]:
    warnings: list[str] = []
    app = SimpleNamespace(display_warning=warnings.append)
    config: Any = SimpleNamespace()
    hook = KernelsHook(str(root), {}, config, config, str(root / "dist"), target, app)  # type: ignore[arg-type]
    data: dict[str, Any] = {"artifacts": [], "pure_python": True}
    hook.initialize("standard", data)
    return data, warnings


def test_without_a_compiler_a_pure_wheel_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    data, warnings = run(root)
    assert data == {"artifacts": [], "pure_python": True}
    assert "libggml does their work: there is no C++ compiler" in warnings[0]


def test_a_release_without_kernels_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("REAP2GGUF_REQUIRE_KERNELS", "1")
    with pytest.raises(RuntimeError, match="not compiled"):
        run(root)


def test_a_compiler_that_fails_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    data, warnings = run(root)
    assert data["pure_python"]
    assert warnings


def test_source_archives_compile_nothing(root: Path) -> None:
    data, warnings = run(root, "sdist")
    assert (data, warnings) == ({"artifacts": [], "pure_python": True}, [])


@pytest.mark.skipif(compiling.compiler() is None, reason="no C++ compiler")
def test_objects_go_into_the_wheel(root: Path) -> None:
    """Of a source that compiles in no time; that the real one compiles, `test_compiled` says."""
    source = root / PLACE / "source" / "cpu.cpp"
    assert source.is_file()
    source.write_text('extern "C" int reap_quantize() { return 0; }\n')
    data, warnings = run(root)
    assert warnings == []
    assert data["pure_python"] is False
    assert data["tag"].startswith("py3-none-")
    targets = compiling.TARGETS[compiling.machine()]
    names = [compiling.object_file(target).name for target in targets]
    assert [Path(name).name for name in data["artifacts"]] == names
    assert all((root / name).is_file() for name in data["artifacts"])
