"""Links that lead out, pipes and devices where files are expected, and absurd arguments."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.room import PLAN, Build, Case, Room

NO_LINK = "a link, which is not followed"
SHARD, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


def replaced(name: str, place: Callable[[Path, Room], Any], model: str = "qwen3") -> Build:
    """`plan` of a model in which something else stands in the place of a file."""

    def build(room: Room) -> list[Any]:
        folder = room.copy(model)
        (folder / name).unlink(missing_ok=True)
        place(folder / name, room)
        return ["plan", folder, *PLAN]

    return build


def link_out(path: Path, room: Room) -> None:
    """A link to a sound file of the same name elsewhere."""
    outside = room.folder / "outside"
    outside.mkdir()
    source = room.sound.folder / "qwen3" / path.name
    (outside / path.name).write_bytes(source.read_bytes() if source.is_file() else b"{}")
    path.symlink_to(outside / path.name)


def link_to(target: str) -> Callable[[Path, Room], None]:
    return lambda path, room: path.symlink_to(target)


def pipe(path: Path, room: Room) -> None:
    os.mkfifo(path)


def folder(path: Path, room: Room) -> None:
    path.mkdir()


def listening(path: Path, room: Room) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def argument(make: Callable[[Path], list[Any]]) -> Build:
    """A command on something that is no file, at a path of its own."""

    def build(room: Room) -> list[Any]:
        room.copy("qwen3")
        path = room.folder / "pipe.x"
        os.mkfifo(path)
        return make(path)

    return build


def named(name: str) -> Build:
    """`plan` with a calibration text that is a pipe."""

    def build(room: Room) -> list[Any]:
        path = room.folder / name
        os.mkfifo(path)
        return ["plan", room.copy("qwen3"), *PLAN, "--calibration", path]

    return build


def pickled(*names: str) -> Build:
    def build(room: Room) -> list[Any]:
        model = room.copy("qwen3")
        (model / SHARD).unlink()
        for name in names:
            (model / name).write_bytes(b"\x80\x04\x95" + b"x" * 100)
        return ["plan", model, *PLAN]

    return build


def unreadable_blob(room: Room) -> list[Any]:
    """The layout of the Hub's cache, but a blob of another repository."""
    snapshot = cache(room)
    other = room.folder / "models--x--other" / "blobs"
    other.mkdir(parents=True)
    (other / "c").write_bytes((room.sound.folder / "qwen3" / CONFIG).read_bytes())
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../../models--x--other/blobs/c")
    return ["plan", snapshot, *PLAN]


def cache(room: Room) -> Path:
    """A sound model in the layout of the Hub's cache."""
    repository = room.folder / "models--x--y"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((room.sound.folder / "qwen3").iterdir())):
        (repository / "blobs" / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


LINKED = (SHARD, CONFIG, TOKENIZER, "tokenizer_config.json", "generation_config.json",
          "chat_template.jinja", "README.md", "LICENSE", "vocab.json", "merges.txt",
          "model.safetensors.index.json")  # fmt: skip
PLACES = [
    *[Case(f"link out, {name}", replaced(name, link_out), NO_LINK)
      for name in LINKED],
    Case("link out, a shard of two", replaced(
        "model-00002-of-00002.safetensors", link_out, "shards"), NO_LINK),
    Case("link to a device", replaced(CONFIG, link_to("/dev/zero")), NO_LINK),
    Case("link to a password file", replaced("LICENSE", link_to("/etc/passwd")), NO_LINK),
    Case("link to nothing", replaced(CONFIG, link_to("gone")), "a broken link"),
    Case("link to itself", replaced(CONFIG, link_to(CONFIG)), "cannot be read"),
    Case("link of templates", replaced("additional_chat_templates", link_to("/etc")), NO_LINK),
    Case("cache of another repository", unreadable_blob, NO_LINK),
    *[Case(f"pipe, {name}", replaced(name, pipe), "is a pipe, expected a file")
      for name in (SHARD, CONFIG, TOKENIZER, "README.md", "chat_template.jinja")],
    *[Case(f"folder, {name}", replaced(name, folder), words) for name, words in (
        (SHARD, "neither model.safetensors"), (CONFIG, "no config.json"),
        (TOKENIZER, "no tokenizer.json"))],
    Case("socket", replaced(CONFIG, listening), "is a socket, expected a file"),
    Case("pipe for observations", argument(lambda path: [
        "prune", "qwen3", "--observations", path, "-o", "out"]), "cannot be read"),
    Case("pipe for an imatrix", argument(lambda path: [
        "quantize", "qwen3", *PLAN, "--imatrix", path, "-o", "out.gguf"]), "cannot be read"),
    Case("pipe for a GGUF file", argument(lambda path: ["verify", "qwen3", path]),
         "cannot be read", code=1),
    Case("device for a GGUF file", lambda room: ["verify", room.copy("qwen3"), "/dev/zero"],
         "cannot be read", code=1),
    Case("device for an imatrix", lambda room: [
        "quantize", room.copy("qwen3"), *PLAN, "--imatrix", "/dev/zero", "-o", "o"], "cannot be"),
    Case("device for observations", lambda room: [
        "prune", room.copy("qwen3"), "--observations", "/dev/zero", "-o", "out"], "cannot be"),
    Case("pipe for a text", named("c.txt"), "a pipe, expected a file"),
    Case("pipe for samples", named("c.jsonl"), "a pipe, expected a file"),
    Case("pipe for a model", argument(lambda path: ["plan", path, *PLAN]), "is a file"),
    Case("pipe for a recipe", argument(lambda path: ["recipes", "show", path]), "no recipe"),
    Case("device for a recipe", lambda room: ["recipes", "show", "/dev/zero"], "no recipe"),
    *[Case(f"pickle, {name}", pickled(name), "holds pickled weights") for name in (
        "pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl")],
    Case("pickle for a model", lambda room: ["plan", room.write("a.bin", b"\x80"), *PLAN],
         "is a file"),
]  # fmt: skip


def plan(*arguments: Any) -> Build:
    return lambda room: ["plan", room.copy("qwen3"), *PLAN, *arguments]


def with_file(name: str, *arguments: Any) -> Build:
    """A command beside a file where it wants a folder."""

    def build(room: Room) -> list[Any]:
        room.copy("qwen3")
        room.copy("seen.safetensors")
        room.write(name, "")
        return list(arguments)

    return build


PRUNE = ("prune", "qwen3", "--observations", "seen.safetensors")
ARGUMENTS = [
    *[Case(f"--keep-experts {n}", plan("--keep-experts", n), words) for n, words in (
        (10**30, "the model has 8 experts"), (-1, "expected 1 or more"), (0, "expected 1 or more"),
        ("1.5", "not a valid integer"), ("9" * 5000, "not a valid integer"), ("x\ny", "x\\ny"))],
    *[Case(f"--compression {n}", plan("--compression", n), words) for n, words in (
        ("nan", "--compression nan"), ("inf", "less than 1"), ("-inf", "expected 0 or more"),
        ("1e999", "less than 1"), ("-0.1", "expected 0 or more"), ("1", "less than 1"),
        ("0.99", "keep at least 2"), ("a\x1b[2J", "is neither a number"))],
    *[Case(f"--memory {n}", plan("--memory", n), words) for n, words in (
        ("1e999GB", "is not a size"), ("9" * 400 + "GB", "is too large"), ("-1G", "is not a size"),
        ("nan", "is not a size"), ("999999999999T", "is too large"), ("", "is not a size"),
        ("8", "8 has no unit; write 8GiB"))],
    *[Case(f"{option} {n}", plan(option, n), "not") for option, n in (
        ("--samples", 0), ("--samples", 10**30), ("--samples", "-1"), ("--samples", "9" * 5000),
        ("--max-length", 1), ("--max-length", 2**31), ("--chunk", 7), ("--chunk", 10**20),
        ("--threads", 0), ("--threads", 10**9), ("--seed", 10**30), ("--seed", "x"),
        ("--seed", "9" * 5000), ("--device", "tpu"), ("--method", "best"), ("--mtp", "keep"))],
    *[Case(f"--name {n[:9]!r}", plan("--name", n), "is not allowed") for n in (
        "a\nb", "../x", "", "a" * 97, "a/b", "\x1b[2J", "observations", "x-GGUF", "é")],
    Case("both ratios", plan("--keep-experts", 4, "--compression", 0.5), "both set the number"),
    Case("option unknown", plan("--experts", 4), "there is no option --experts"),
    Case("option without value", plan("--name"), "requires an argument"),
    Case("argument too many", plan("another"), "unexpected extra argument"),
    Case("recipe of no name", plan("--recipe", ""), "no recipe ''"),
    Case("no command", lambda room: ["a\nb"], "there is no command"),
    Case("recipe unknown", lambda room: ["plan", room.copy("qwen3"), "--recipe", "a\nb"], "a\\nb"),
    Case("label of nothing", plan("--label", "a\nb"), "is not RECIPE=LABEL"),
    Case("label of another recipe", plan("--label", "a\nb=X"), "no recipe"),
    Case("label with a path", plan("--label", "q8_0=../x"), "label '../x', expected letters"),
    Case("label of a long name", plan("--label", "q8_0=" + "x" * 10**5), "expected letters"),
    Case("recipes of one label", plan("--recipe", "bf16", "--label", "bf16=Q8_0"), "two recipes"),
    Case("model not there", lambda room: ["plan", "./a\nb", *PLAN], "./a\\nb: no such folder"),
    Case("model of a long name", lambda room: ["plan", "n" * 10**5, *PLAN], "no such folder"),
    Case("model of a long path", lambda room: ["plan", "/n" * 10**5, *PLAN], "no such folder"),
    Case("model of a user unknown", lambda room: ["plan", "~nobody-here/x", *PLAN], "no such fold"),
    Case("model an address", lambda room: ["plan", "https://a:pw@x/y/z", *PLAN],
         "//...@x/y/z: is not a page of"),
    Case("model a GGUF file", lambda room: ["plan", room.write("a.gguf", ""), *PLAN],
         "a.gguf: empty, expected a GGUF file"),
    Case("model empty", lambda room: ["plan", "", *PLAN], "no such folder"),
    Case("model a file", lambda room: ["plan", room.write("a", ""), *PLAN], "is a file"),
    Case("model an empty folder", lambda room: ["plan", room.folder, *PLAN], "no config.json"),
    Case("output a file", with_file(
        "out", "build", "qwen3", *PLAN, "--output", "out"), "cannot be written"),
    Case("output below a file", with_file("file", *PRUNE, "-o", "file/out"), "does not exist"),
    Case("output there", with_file("out", *PRUNE, "-o", "out"), "exists already"),
    Case("output of a long name", with_file("a", *PRUNE, "-o", "n" * 300), "too long"),
    Case("output below nothing", with_file("a", *PRUNE, "-o", "gone/out"), "does not exist"),
    Case("output a folder", with_file("a", "observe", "qwen3", "-o", "."), "directory"),
    Case("quantize to an empty name", with_file("a", "quantize", "qwen3", *PLAN, "-o", ""),
         "expected the name"),
    Case("output empty", with_file("a", *PRUNE, "-o", ""), "expected the name"),
    Case("verify nothing", lambda room: ["verify"], "Missing argument"),
    Case("verify what is not there", lambda room: ["verify", "a\nb"], "no such file or folder"),
    Case("verify of a long name", lambda room: ["verify", "n" * 10**5], "no such file or folder"),
    Case("verify an empty folder", lambda room: ["verify", room.folder], "neither a bundle nor"),
    Case("verify a file alone", lambda room: ["verify", room.write("a", "")], "pass a bundle"),
    Case("imatrix to a .dat", lambda room: [
        "imatrix", room.copy("qwen3"), "--text", "t", "-o", "i.dat"], "name the .gguf"),
]  # fmt: skip
