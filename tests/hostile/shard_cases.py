"""Broken safetensors headers, and indexes that name what is not there."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.room import PLAN, Build, Case, Room, change_json, sparse

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
Header = dict[str, Any]


def read(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def plan_with_header(change: Callable[[Header], Any]) -> Build:
    """`plan` of a model whose shard's header is edited."""

    def build(room: Room) -> list[Any]:
        model = room.copy("qwen3")
        header, data = read(model / "model.safetensors")
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        return ["plan", model, *PLAN]

    return build


def norm(**values: Any) -> Build:
    return plan_with_header(lambda header: header[NORM].update(values))


def plan_with_bytes(content: bytes) -> Build:
    """`plan` of a model whose shard is these bytes."""

    def build(room: Room) -> list[Any]:
        model = room.copy("qwen3")
        (model / "model.safetensors").write_bytes(content)
        return ["plan", model, *PLAN]

    return build


def named(name: str) -> Build:
    """A tensor more, without values, under a name that is none."""

    def add(header: Header) -> None:
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__")
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    return plan_with_header(add)


def twice(header: Header) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode()


def as_text(old: str, new: str) -> Build:
    return plan_with_header(lambda header: json.dumps(header).replace(old, new).encode())


def shorter(room: Room) -> list[Any]:
    path = room.copy("qwen3") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return ["plan", path.parent, *PLAN]


def longer(room: Room) -> list[Any]:
    path = room.copy("qwen3") / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"payload")
    return ["plan", path.parent, *PLAN]


def huge_header(piece: bytes) -> Build:
    """A header as long as it may be, of many small values."""
    text = b'{"a":[' + piece * (30 * 2**20 // len(piece)) + piece[:-1] + b"]}"
    return plan_with_bytes_later(lambda: struct.pack("<Q", len(text)) + text)


def plan_with_bytes_later(make: Callable[[], bytes]) -> Build:
    def build(room: Room) -> list[Any]:
        return plan_with_bytes(make())(room)

    return build


def absurd_row(room: Room) -> list[Any]:
    """A tensor of no architecture, of a terabyte, in a file that takes no room."""
    model = room.copy("qwen3")
    text = json.dumps({"x": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}).encode()
    begin = struct.pack("<Q", len(text)) + text
    (model / "model.safetensors").unlink()
    room.sparse("qwen3/model.safetensors", len(begin) + 2**40, begin)
    return ["plan", model, *PLAN]


def index(change: Callable[[dict[str, Any]], Any]) -> Build:
    """`plan` of a model in two shards whose index is edited."""

    def build(room: Room) -> list[Any]:
        model = room.copy("shards")
        change_json(model / INDEX, change)
        return ["plan", model, *PLAN]

    return build


def shard_of_norm(value: Any) -> Build:
    return index(lambda values: values["weight_map"].update({NORM: value}))


def raw_index(content: bytes) -> Build:
    def build(room: Room) -> list[Any]:
        model = room.copy("shards")
        (model / INDEX).write_bytes(content)
        return ["plan", model, *PLAN]

    return build


def shard_gone(room: Room) -> list[Any]:
    model = room.copy("shards")
    (model / "model-00002-of-00002.safetensors").unlink()
    return ["plan", model, *PLAN]


def shard_twice(room: Room) -> list[Any]:
    model = room.copy("shards")
    first, second = (model / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    second.write_bytes(first.read_bytes())
    return ["plan", model, *PLAN]


def many_shards(values: dict[str, Any]) -> None:
    values["weight_map"] |= {f"x{n}": f"{n}.safetensors" for n in range(20_000)}


EMPTY = struct.pack("<Q", 2) + b"{}"
SHARDS = [
    Case("empty file", plan_with_bytes(b""), "too short"),
    Case("seven bytes", plan_with_bytes(b"1234567"), "too short"),
    Case("length beyond the file", plan_with_bytes(struct.pack("<Q", 10**6) + b"{}"), "claims a"),
    Case("length zero", plan_with_bytes(struct.pack("<Q", 0) + b"{}"), "claims a header of 0"),
    Case("length minus one", plan_with_bytes(struct.pack("<q", -1) + b"{}"), "claims a header"),
    Case("length 2^63", plan_with_bytes(struct.pack("<Q", 2**63) + b"{}"), "claims a header"),
    Case("no tensors", plan_with_bytes(EMPTY), "missing from the checkpoint"),
    Case("a pickle", plan_with_bytes(b"\x80\x04\x95" + b"x" * 100), "claims a header"),
    Case("a zip", plan_with_bytes(b"PK\x03\x04" + b"\0" * 100), "safetensors"),
    Case("header not UTF-8", plan_with_header(
        lambda header: json.dumps(header).encode().replace(b"norm", b"n\xffrm")), "not UTF-8"),
    Case("header a list", plan_with_header(lambda header: b"[1, 2]"), "holds a list"),
    Case("header a number", plan_with_header(lambda header: b"1234567"), "holds a int"),
    Case("header cut", plan_with_header(lambda header: b'{"a": {"dty'), "not valid JSON"),
    Case("header of NUL", plan_with_header(lambda header: bytes(4096)), "not valid JSON"),
    Case("header deep", plan_with_header(lambda header: b"[" * 10**6), "not valid JSON"),
    Case("header deep objects", plan_with_header(
        lambda header: b'{"a":' * 500 + b"1" + b"}" * 500), "nested deeper"),
    Case("name twice", plan_with_header(twice), "occurs twice"),
    Case("NaN in the shape", as_text('"shape": [64]', '"shape": [NaN]'), "NaN is not JSON"),
    Case("Infinity in the offsets", as_text("[0, ", "[-Infinity, "), "is not JSON"),
    Case("half a character", named("\ud800"), "half a character"),
    Case("surrogates of a name", as_text(NORM, "\\ud83d"), "half a character"),
    Case("metadata a list", plan_with_header(
        lambda header: header.update(__metadata__=[1])), "__metadata__"),
    Case("metadata of numbers", plan_with_header(
        lambda header: header.update(__metadata__={"a": 1})), "__metadata__"),
    Case("entry a list", plan_with_header(lambda h: h.update({NORM: [1]})), "expected dtype"),
    Case("entry null", plan_with_header(lambda h: h.update({NORM: None})), "expected dtype"),
    Case("entry with more", norm(extra=1), "expected dtype, shape and data_offsets"),
    Case("shape negative", norm(shape=[-64]), "shape [-64]"),
    Case("shape a float", norm(shape=[64.0]), "shape [64.0]"),
    Case("shape a text", norm(shape=["64"]), "shape ['64']"),
    Case("shape true", norm(shape=[True]), "shape [True]"),
    Case("shape null", norm(shape=None), "shape None"),
    Case("shape nested", norm(shape=[[64]]), "shape [[64]]"),
    Case("shape overflows", norm(shape=[2**47] * 8), "bytes, expected"),
    Case("shape of 2^64", norm(shape=[2**64]), "expected at most 8 sizes"),
    Case("shape of 5000 digits", as_text("[64]", f"[{'9' * 5000}]"), "not valid JSON"),
    Case("a million dimensions", norm(shape=[1] * 10**6), "expected at most 8 sizes"),
    Case("shape empty and huge", norm(shape=[0, 2**47]), "holds nothing"),
    Case("dtype unknown", norm(dtype="F128"), "dtype 'F128'"),
    Case("dtype a number", norm(dtype=32), "dtype 32"),
    Case("dtype a megabyte", norm(dtype="F" * 10**6), "dtype 'FFF"),
    Case("dtype of other size", norm(dtype="F64"), "bytes, expected"),
    Case("offsets negative", norm(data_offsets=[-128, 0]), "data_offsets [-128, 0]"),
    Case("offsets reversed", norm(data_offsets=[128, 0]), "data_offsets [128, 0]"),
    Case("offsets beyond", norm(data_offsets=[2**40, 2**40 + 128]), "leaves a gap"),
    Case("offsets of 2^63", norm(data_offsets=[2**63, 2**63 + 128]), "expected [begin, end]"),
    Case("offsets overlap", norm(data_offsets=[0, 128]), "overlaps"),
    Case("offsets true", norm(data_offsets=[False, True]), "data_offsets [False, True]"),
    Case("offsets three", norm(data_offsets=[0, 128, 256]), "expected [begin, end]"),
    Case("name with a newline", named("a\nError: nothing is wrong"), "a\\nError"),
    Case("name that clears", named("\x1b[2J\x1b[H"), "\\x1b[2J"),
    Case("name right to left", named("a\u202eb"), "\\u202e"),
    Case("name of NUL", named("a\0b"), "\\x00"),
    Case("name of ten megabytes", named("n" * 10**7), "has no meaning"),
    Case("name of emoji, long", named("\U0001f600" * 10**6), "has no meaning"),
    Case("name empty", named(""), "has no meaning"),
    Case("layer of many digits", named(f"model.layers.{'9' * 10**5}.mlp.gate.weight"), "no mean"),
    Case("shape other than config", norm(shape=[8, 8]), "as config.json says"),
    Case("file cut", shorter, "truncated"),
    Case("bytes after the end", longer, "followed by unknown bytes"),
    Case("header of lists", huge_header(b"[],"), "values, expected at most"),
    Case("header of objects", huge_header(b"{},"), "values, expected at most"),
    Case("header one long text", plan_with_bytes_later(lambda: struct.pack("<Q", 31 * 2**20)
         + '{"\U0001f600'.encode() + b"a" * (31 * 2**20 - 6)), "not valid JSON"),
    Case("a terabyte", absurd_row, "tensor 'x' is stored as U8"),
    Case("a sparse file of zeros", sparse("qwen3", "model.safetensors", 2**40), "header of 0"),
]  # fmt: skip
INDEXES = [
    Case("index leads up", shard_of_norm("../qwen3/model.safetensors"), "a plain name"),
    Case("index absolute", shard_of_norm("/etc/passwd"), "a plain name"),
    Case("index a device", shard_of_norm("/dev/zero"), "a plain name"),
    Case("index dots", shard_of_norm(".."), "a plain name"),
    Case("index a dot", shard_of_norm("."), "a plain name"),
    Case("index empty", shard_of_norm(""), "a plain name"),
    Case("index of NUL", shard_of_norm("a\0b"), "a plain name"),
    Case("index a backslash", shard_of_norm("..\\a"), "a plain name"),
    Case("index half a character", shard_of_norm("\ud800"), "half a character"),
    Case("index a number", shard_of_norm(5), "names the file 5"),
    Case("index null", shard_of_norm(None), "names the file None"),
    Case("index a list", shard_of_norm(["a"]), "names the file ['a']"),
    Case("index of a long name", shard_of_norm("n" * 5000), "shards missing"),
    Case("index of a newline", shard_of_norm("a\nb.safetensors"), "a\\nb.safetensors"),
    Case("index of the config", shard_of_norm("config.json"), "config.json: claims a header"),
    Case("index of the wrong shard", index(lambda values: values["weight_map"].update(
        dict.fromkeys(values["weight_map"], "model-00001-of-00002.safetensors"))), "in no shard"),
    Case("index names swapped", index(lambda values: values["weight_map"].update({
        NORM: "model-00001-of-00002.safetensors" if "2-of" in values["weight_map"][NORM]
        else "model-00002-of-00002.safetensors"})), "the index says"),
    Case("index misses a tensor", index(lambda v: v["weight_map"].pop(NORM) and None), "not in"),
    Case("index has a tensor more", index(lambda v: v["weight_map"].update(
        {"zz": "model-00001-of-00002.safetensors"})), "in no shard"),
    Case("index of many shards", index(many_shards), "names 20,002 files"),
    Case("index without map", index(lambda values: {"metadata": {}}), "no weight_map"),
    Case("index map a list", index(lambda values: {"weight_map": [1]}), "no weight_map"),
    Case("index map empty", index(lambda values: {"weight_map": {}}), "no weight_map"),
    Case("index a list itself", index(lambda values: [1]), "holds a list"),
    Case("index a text", raw_index(b'"abc"'), "holds a str"),
    Case("index no JSON", raw_index(b"\0\1\2"), "not valid JSON"),
    Case("index not UTF-8", raw_index(b'{"weight_map": {"\xff": 1}}'), "not UTF-8"),
    Case("index of NaN", raw_index(b'{"weight_map": {"a": NaN}}'), "NaN is not JSON"),
    Case("index twice the key", raw_index(b'{"weight_map": {}, "weight_map": {}}'), "occurs twice"),
    Case("index deep", raw_index(b'{"a":' + b"[" * 10**5), "not valid JSON"),
    Case("index huge", sparse("shards", INDEX, 2**38), "expected at most"),
    Case("shard gone", shard_gone, "1 of 2 shards missing"),
    Case("shard twice", shard_twice, "which another shard holds"),
]  # fmt: skip
