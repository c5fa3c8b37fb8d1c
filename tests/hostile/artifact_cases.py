"""Broken observations and broken bundles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.hostile.room import Build, Case, Room, change_json

Arrays = dict[str, Any]
COUNT, SUMS = "layers.0.count", "layers.0.reap_sum"
MANIFEST = "reap2gguf.json"


def seen(change: Callable[[Arrays, dict[str, str]], Any]) -> Build:
    """`prune` by observations that are edited."""

    def build(room: Room) -> list[Any]:
        path = room.copy("seen.safetensors")
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata.pop("sha256")  # or it would say that the file was changed, and no more
        change(arrays, metadata)
        save_file(arrays, path, metadata)
        return prune(room, path)

    return build


def prune(room: Room, path: Path) -> list[Any]:
    return ["prune", room.copy("qwen3"), "--observations", path, "-o", "out"]


def put(name: str, values: Any, dtype: Any = np.float64) -> Build:
    return seen(lambda arrays, metadata: arrays.update({name: np.asarray(values, dtype)}))


def say(name: str, text: str) -> Build:
    return seen(lambda arrays, metadata: metadata.update({name: text}))


def of_bytes(content: bytes) -> Build:
    return lambda room: prune(room, room.write("seen.safetensors", content))


def nine(arrays: Arrays, metadata: dict[str, str]) -> None:
    for name, values in arrays.items():
        arrays[name] = np.ones(9, values.dtype)


def one_layer(arrays: Arrays, metadata: dict[str, str]) -> None:
    for name in [name for name in arrays if name.startswith("layers.1.")]:
        del arrays[name]


OBSERVATIONS = [
    Case("seen counts of floats", put(COUNT, np.ones(8)), "of the wrong type"),
    Case("seen counts of bytes", put(COUNT, np.ones(8), np.uint8), "of the wrong type"),
    Case("seen counts unsigned", put(COUNT, np.ones(8), np.uint64), "of the wrong type"),
    Case("seen counts negative", put(COUNT, [-1] * 8, np.int64), "negative"),
    Case("seen counts in rows", put(COUNT, np.ones((2, 4)), np.int64), "different sizes"),
    Case("seen counts of none", put(COUNT, [], np.int64), "different sizes"),
    Case("seen sums of integers", put(SUMS, np.ones(8), np.int64), "of the wrong type"),
    Case("seen sums of halves", put(SUMS, np.ones(8), np.float16), "of the wrong type"),
    Case("seen sums NaN", put(SUMS, [np.nan] * 8), "NaN or infinite"),
    Case("seen sums infinite", put(SUMS, [np.inf] * 8), "NaN or infinite"),
    Case("seen sums negative", put(SUMS, [-1.0] * 8), "negative"),
    Case("seen sums of one", put(SUMS, 1.0), "different sizes"),
    Case("seen sums of seven", put(SUMS, np.ones(7)), "different sizes"),
    Case("seen of nine experts", seen(nine), "9 experts, expected 8"),
    Case("seen one layer", seen(one_layer), "expected the model's 2 MoE layers"),
    Case("seen without sums", seen(lambda arrays, _: arrays.pop(SUMS)), "is missing"),
    Case("seen a foreign tensor", put("weights", [1.0]), "not observations"),
    Case("seen a foreign layer", put("layers.007.count", [1]), "not observations"),
    Case("seen a name of a newline", put("a\nb", [1.0]), "not observations"),
    Case("seen without metadata", seen(lambda _, metadata: metadata.clear()), "format version"),
    Case("seen version 99", say("format_version", "99\x1b[2J"), "format version '99\\x1b[2J'"),
    Case("seen rows a text", say("n_rows", "many"), "n_rows"),
    Case("seen rows negative", say("n_rows", "-4"), "n_rows"),
    Case("seen rows of 5000 digits", say("n_rows", "9" * 5000), "n_rows"),
    Case("seen tokens broken", say("n_tokens", "1.5"), "n_tokens"),
    Case("seen of another model", say("model_fingerprint", "0" * 64), "of another checkpoint"),
    Case("seen empty", of_bytes(b""), "too short"),
    Case("seen of text", of_bytes(b"these are no observations"), "claims a header"),
    Case("seen a pickle", of_bytes(b"\x80\x04\x95" + b"x" * 99), "claims a header"),
    Case("seen a model", lambda room: prune(room, room.copy("qwen3") / "model.safetensors"),
         "format version None"),
    Case("seen sparse", lambda room: prune(room, room.sparse("s.safetensors", 2**40)), "header"),
]  # fmt: skip


def bundle(change: Callable[[Path, Path], Any]) -> Build:
    """`verify` of a bundle in which something is edited; `change` takes both folders."""

    def build(room: Room) -> list[Any]:
        folder = room.copy("build")
        change(folder / "name", folder / "name-GGUF")
        return ["verify", folder / "name-GGUF"]

    return build


def manifest(change: Callable[[dict[str, Any]], Any]) -> Build:
    return bundle(lambda hf, gguf: change_json(gguf / MANIFEST, change))


def in_manifest(part: str, values: dict[str, Any]) -> Build:
    def change(found: dict[str, Any]) -> None:
        target = found[part][0] if isinstance(found[part], list) else found[part]
        target.update(values)

    return manifest(change)


def file(name: str, content: bytes) -> Build:
    return bundle(lambda hf, gguf: (gguf / name).write_bytes(content))


def hf_file(name: str, content: bytes) -> Build:
    return bundle(lambda hf, gguf: (hf / name).write_bytes(content))


def sparse(path: Path, n_bytes: int) -> None:
    path.unlink()
    with path.open("wb") as opened:
        opened.truncate(n_bytes)


SUMS_LINES = b"\n".join(b"%064x  file-%d" % (n, n) for n in range(2000)) + b"\n"
NAMES = ["..", "", ".", "a/b", "/etc/passwd", "a\0b"]
NO_NAMES: list[Any] = [5, None, []]
BUNDLES = [
    *[Case(f"manifest folder {n!r}", in_manifest("hf", {"folder": n}), "not a plain file name", 1)
      for n in NAMES],
    *[Case(f"manifest file {n!r}", in_manifest("gguf", {"file": n}), "plain file name", 1)
      for n in NAMES],
    *[Case(f"manifest folder {n!r}", in_manifest("hf", {"folder": n}), "folder is", 1)
      for n in NO_NAMES],
    *[Case(f"manifest file {n!r}", in_manifest("gguf", {"file": n}), "file is", 1)
      for n in NO_NAMES],
    Case("manifest file of a newline", in_manifest("gguf", {"file": "a\nb"}), "a\\nb is", 1),
    Case("manifest file long", in_manifest("gguf", {"file": "n" * 10**5}), "is missing", 1),
    Case("manifest type", in_manifest("gguf", {"tensors": {"a": "ZZ"}}), "tensor type 'ZZ'", 1),
    Case("manifest type a list", in_manifest("gguf", {"tensors": {"a": []}}), "not a complete", 1),
    Case("manifest tensors a list", in_manifest("gguf", {"tensors": []}), "not a complete", 1),
    Case("manifest tensors none", in_manifest("gguf", {"tensors": {}}), "is not in the plan", 1),
    Case("manifest kept infinite", in_manifest("pruning", {"kept": {"0": [1e400]}}), "not ", 1),
    Case("manifest kept a text", in_manifest("pruning", {"kept": {"a": [1]}}), "not a complete", 1),
    Case("manifest kept count", in_manifest("pruning", {"n_kept": "x\ny"}), "n_kept is", 1),
    Case("manifest kept of a negative layer", in_manifest("pruning", {"kept": {"-1": [1]}}),
         "not the number of a layer", 1),
    Case("manifest no experts", in_manifest("pruning", {"n_experts": 0}), "n_experts is 0", 1),
    Case("manifest no files", manifest(lambda found: found.update(gguf=[])), "gguf is empty", 1),
    Case("manifest of an original", in_manifest("source", {"earlier": {"label": "a"}}), "not a", 1),
    Case("manifest more keys", in_manifest("source", {"a": 1}), "not a complete", 1),
    Case("manifest format 2", manifest(lambda found: found.update(format=2)), "of format 1", 1),
    Case("manifest empty", manifest(lambda found: {"format": 1}), "not a complete", 1),
    Case("manifest a list", manifest(lambda found: [1]), "holds a list", 1),
    Case("manifest gguf a number", manifest(lambda found: found.update(gguf=5)), "not a comp", 1),
    Case("manifest files a list", in_manifest("hf", {"files": []}), "not a complete", 1),
    Case("manifest not JSON", file(MANIFEST, b"{"), "not valid JSON", 1),
    Case("manifest binary", file(MANIFEST, bytes(range(256))), "not UTF-8", 1),
    Case("manifest deep", file(MANIFEST, b'{"a":' * 10**5), "not valid JSON", 1),
    Case("manifest huge", bundle(lambda hf, gguf: sparse(gguf / MANIFEST, 2**38)), "at most", 1),
    Case("sums binary", file("SHA256SUMS", bytes(range(256)) * 99), "is not a hash", 1),
    Case("sums of lines", file("SHA256SUMS", b"\n" * 10**6), "(999,999 more are wrong)", 1),
    Case("sums of files that are not", file("SHA256SUMS", SUMS_LINES),
         "names file-7, which is no part", 1),
    Case("sums of paths", file("SHA256SUMS", b"0" * 64 + b"  ../name\n"), "not a hash", 1),
    Case("sums of a NUL", file("SHA256SUMS", b"0" * 64 + b"  a\0b\n"),
         "a\\x00b', which is no part", 1),
    Case("sums of a long name", file("SHA256SUMS", b"0" * 64 + b"  " + b"n" * 9999 + b"\n"),
         "which is no part of the bundle", 1),
    Case("sums huge", bundle(lambda hf, gguf: sparse(gguf / "SHA256SUMS", 2**38)), "at most", 1),
    Case("sums gone", bundle(lambda hf, gguf: (gguf / "SHA256SUMS").unlink()), "is missing", 1),
    Case("bundle a file more", file("a\nb\x1b[2J", b""), "a\\nb\\x1b[2J' is not part", 1),
    Case("bundle GGUF gone", bundle(lambda hf, gguf: (gguf / "name-Q8_0.gguf").unlink()),
         "is missing", 1),
    Case("bundle GGUF empty", file("name-Q8_0.gguf", b""), "empty, expected a GGUF file", 1),
    Case("bundle config broken", hf_file("config.json", b"{"), "not valid JSON", 1),
    Case("bundle shard broken", hf_file("model.safetensors", b"x" * 99), "claims a header", 1),
    Case("bundle tokenizer broken", hf_file("tokenizer.json", b"{}"), "tokenizer model None", 1),
    Case("bundle experts other", bundle(lambda hf, gguf: change_json(
        hf / "config.json", lambda v: v.update(num_experts=7))), "expert", 1),
    Case("bundle of a bare manifest", lambda room: [
        "verify", room.write(MANIFEST, json.dumps({"format": 1})).parent], "not a complete", 1),
]  # fmt: skip
