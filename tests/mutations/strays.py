"""Group F, continued: files that are not part of a bundle, and files that are links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.mutations.damage import Absent, Copy, Damage
from tests.mutations.hf_files import Apply, add_file
from tests.mutations.models import Sound


def damages(sound: Sound) -> Iterator[Damage]:
    for title, apply in _STRAYS:
        yield Damage("F", title, apply)
    reason = "a clone of a repository has one, and it is not published"
    yield Damage("F", "a .git folder", _folder(lambda copy: copy.hf / ".git"), harmless=reason)


def _link(name: str, to_gguf: bool = False) -> Apply:
    """A file of the bundle becomes a link to the same bytes outside."""

    def apply(copy: Copy) -> None:
        path = (copy.gguf if to_gguf else copy.hf) / name
        if not path.is_file():
            raise Absent(f"no {name}")
        outside = copy.hf.parent / f"outside-{name}"
        outside.write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(outside)

    return apply


def _link_model(copy: Copy) -> None:
    _link(copy.quantized.name, to_gguf=True)(copy)


def _stray_link(to_gguf: bool) -> Apply:
    def apply(copy: Copy) -> None:
        ((copy.gguf if to_gguf else copy.hf) / "stray").symlink_to("/etc/hostname")

    return apply


def _dangling(copy: Copy) -> None:
    (copy.gguf / "dangling").symlink_to("nowhere")


def _pipe(copy: Copy) -> None:
    os.mkfifo(copy.gguf / "pipe")


def _folder(path: Callable[[Copy], Path]) -> Apply:
    def apply(copy: Copy) -> None:
        path(copy).mkdir()
        (path(copy) / "file").write_text("x")

    return apply


def _copy_of_shard(name: str) -> Apply:
    def apply(copy: Copy) -> None:
        first = sorted(copy.hf.glob("*.safetensors"))[0]
        if (copy.hf / name).exists():
            raise Absent(f"has {name}")
        copy.put(copy.hf / name, first.read_bytes())

    return apply


def _other_model(copy: Copy) -> None:
    copy.put(copy.gguf / "other.gguf", copy.exact.read_bytes())


_STRAYS: list[tuple[str, Apply]] = [
    ("stray: a shard that no index names", _copy_of_shard("model-00004-of-00004.safetensors")),
    ("stray: model.safetensors beside shards", _copy_of_shard("model.safetensors")),
    ("stray: consolidated.safetensors", _copy_of_shard("consolidated.safetensors")),
    ("stray: an adapter", add_file("adapter_config.json", '{"peft_type": "LORA"}')),
    ("stray: adapter_model.safetensors", _copy_of_shard("adapter_model.safetensors")),
    ("stray: pytorch_model.bin", add_file("pytorch_model.bin", b"\x80\x02}.")),
    ("stray: Python code", add_file("modeling_x.py", "print(1)\n")),
    ("stray: config.json.bak", add_file("config.json.bak", "{}")),
    ("stray: a hidden file", add_file(".hidden", "x")),
    ("stray: a hidden file by the GGUFs", add_file(".hidden", "x", to_gguf=True)),
    ("stray: kept_experts.json", add_file("kept_experts.json", "{}")),
    ("stray: another GGUF", _other_model),
    ("stray: an empty GGUF", add_file("empty.gguf", b"", to_gguf=True)),
    ("stray: a script by the GGUFs", add_file("run.sh", "echo\n", to_gguf=True)),
    ("stray: a template by the GGUFs", add_file("template", "x", to_gguf=True)),
    ("stray: a folder by the safetensors", _folder(lambda copy: copy.hf / "more")),
    ("stray: a folder by the GGUFs", _folder(lambda copy: copy.gguf / "more")),
    ("stray: a link", _stray_link(False)),
    ("stray: a link by the GGUFs", _stray_link(True)),
    ("stray: a link to nothing", _dangling),
    ("stray: a pipe", _pipe),
    ("config.json is a link out", _link("config.json")),
    ("tokenizer.json is a link out", _link("tokenizer.json")),
    ("the quantized file is a link out", _link_model),
    ("calibration.txt is a link out", _link("calibration.txt", to_gguf=True)),
]
