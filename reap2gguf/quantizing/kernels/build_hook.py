"""The build hook of pyproject.toml: compiles the kernels for a wheel or an installed checkout.

The wheel is then of this kind of machine, for any Python 3. Without a C++ compiler, or if it fails,
a wheel without kernels is made, and says so: libggml does their work. A release must have them:
with REAP2GGUF_REQUIRE_KERNELS=1 that is an error.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_HERE = Path("reap2gguf", "quantizing", "kernels")
_REQUIRED = "REAP2GGUF_REQUIRE_KERNELS"


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled objects to a wheel, and its platform to the wheel's name."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        made = self._compile()
        if not made:
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
        for file in made:
            build_data["artifacts"].append(file.relative_to(self.root).as_posix())

    def _compile(self) -> list[Path]:
        compiling = _module(Path(self.root, _HERE, "compiling.py"))
        try:
            made: list[Path] = compiling.compile_objects()
            problem = "there is no C++ compiler, or no kernels for this kind of machine"
        except (OSError, subprocess.CalledProcessError) as error:
            made, problem = [], str(getattr(error, "stderr", "") or error)
        if not made:
            if os.environ.get(_REQUIRED) == "1":
                raise RuntimeError(f"the kernels were not compiled: {problem}")
            self.app.display_warning(f"no compiled kernels, libggml does their work: {problem}")
        return made


def _platform() -> str:
    """The platform tag of wheels made here, such as linux_x86_64."""
    from packaging.tags import platform_tags

    return next(iter(platform_tags()))


def _module(path: Path) -> ModuleType:
    """A module of the package by its file: the package itself cannot be imported yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
