"""Broken GGUF files, as `verify` meets them, and broken importance matrices."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, load_imatrix, save_dat, save_gguf
from tests.hostile.room import Build, Case, Room

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
QUANTIZE = ("--recipe", "q4km", "-o", "out.gguf")


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, ne: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


ARCH = key("general.architecture", STRING, text("qwen3moe"))


def gguf(
    *keys: bytes,
    tensors: tuple[bytes, ...] = (),
    counts: tuple[int, int] | None = None,
    begin: bytes = b"GGUF" + struct.pack("<I", 3),
    data: bytes = b"",
) -> bytes:
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = begin + struct.pack("<QQ", n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def verify_file(content: bytes) -> Build:
    """`verify` of a sound folder with these bytes as its GGUF file."""
    return lambda room: ["verify", room.copy("qwen3"), room.write("x.gguf", content)]


def aligned(value: bytes, kind: int = U32) -> bytes:
    one = (tensor("a", [8]),)
    return gguf(ARCH, key("general.alignment", kind, value), tensors=one, data=bytes(32))


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return key("a", ARRAY, struct.pack("<IQ", kind, count) + items)


def real(change: Callable[[bytes], bytes]) -> Build:
    """`verify` of a sound folder with its own GGUF file, edited."""

    def build(room: Room) -> list[Any]:
        path = room.copy("build") / "name-GGUF" / "name-Q8_0.gguf"
        path.write_bytes(change(path.read_bytes()))
        return ["verify", path.parent.parent / "name", path]

    return build


def sparse_keys(room: Room) -> list[Any]:
    """Keys of 60 MiB each, of which none takes room."""
    path = room.write("x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 100))
    with path.open("r+b") as file:
        file.seek(24)
        for number in range(100):
            file.write(key(f"k{number}", STRING, struct.pack("<Q", 60 * 2**20)))
            file.seek(60 * 2**20, 1)
        file.truncate(file.tell())
    return ["verify", room.copy("qwen3"), path]


HALF = gguf(ARCH, tensors=(tensor("a", [8]), tensor("b", [8], 0, 32)), data=bytes(64))
ONE = (tensor("a", [8]),)
MANY_I16 = 2**22 + 1
VERIFIED = [
    ("empty", b"", "empty"),
    ("two bytes", b"GG", "truncated"),
    ("other magic", b"GGML" + bytes(100), "begins with b'GGML'"),
    ("version 1", gguf(begin=b"GGUF" + struct.pack("<I", 1)), "version 1"),
    ("version of the other order", gguf(begin=b"GGUF" + struct.pack(">I", 3)), "version 50331648"),
    ("2^64 tensors", gguf(counts=(2**64 - 1, 0)), "tensors, expected at most"),
    ("2^64 keys", gguf(counts=(0, 2**64 - 1)), "keys, expected at most"),
    ("100,000 tensors", gguf(counts=(100_000, 0)), "truncated"),
    ("60,000 keys", gguf(counts=(0, 60_000)), "truncated"),
    ("key of 2^60 bytes", gguf(struct.pack("<Q", 2**60)), "bytes in a string"),
    ("key of 2^64 bytes", gguf(struct.pack("<q", -1)), "bytes in a string"),
    ("key not UTF-8", gguf(key(b"\xff", U8, b"1")), "not UTF-8"),
    ("key twice", gguf(ARCH, ARCH), "occurs twice"),
    ("key with a newline, twice", gguf(*[key("a\nb", U8, b"1")] * 2), "'a\\nb'"),
    ("key of 60,000 letters, twice", gguf(*[key("k" * 60_000, U8, b"1")] * 2), "occurs twice"),
    ("value of 2^60 letters", gguf(key("a", STRING, struct.pack("<Q", 2**60))), "bytes in a stri"),
    ("value not UTF-8", gguf(key("a", STRING, text(b"\xff"))), "not UTF-8"),
    ("value half a character", gguf(key("a", STRING, text(b"\xed\xa0\x80"))), "not UTF-8"),
    ("value type 99", gguf(key("a", 99, b"1")), "unknown value type 99"),
    ("array of arrays", gguf(array(ARRAY, 1)), "an array of arrays"),
    ("array of type 99", gguf(array(99, 1)), "unknown value type 99"),
    ("array of 2^64", gguf(array(U8, 2**64 - 1)), "array items, expected at most"),
    ("array of 2^40", gguf(array(STRING, 2**40)), "array items, expected at most"),
    ("array of many", gguf(array(U16, MANY_I16, bytes(2 * MANY_I16))), "array items"),
    ("array cut", gguf(array(U64, 4, bytes(8))), "array items"),
    ("alignment 0", aligned(struct.pack("<I", 0)), "general.alignment is 0"),
    ("alignment 3", aligned(struct.pack("<I", 3)), "general.alignment is 3"),
    ("alignment 48", aligned(struct.pack("<I", 48)), "expected a power of two"),
    ("alignment 2^31", aligned(struct.pack("<I", 2**31)), "expected a power of two"),
    ("alignment negative", aligned(struct.pack("<i", -32), I32), "general.alignment is -32"),
    ("alignment a float", aligned(struct.pack("<f", 32), F32), "general.alignment is 32.0"),
    ("alignment a text", aligned(text("32"), STRING), "general.alignment is '32'"),
    ("alignment true", aligned(b"\1", BOOL), "general.alignment is True"),
    ("tensor of no dimensions", gguf(tensors=(tensor("a", []),)), "0 dimensions"),
    ("tensor of 5 dimensions", gguf(tensors=(tensor("a", [1] * 5),)), "5 dimensions"),
    ("tensor of 2^32 dimensions", gguf(tensors=(text("a") + b"\xff" * 4,)), "dimensions"),
    ("tensor without values", gguf(tensors=(tensor("a", [0]),)), "has no values"),
    ("tensor of 2^63", gguf(tensors=(tensor("a", [2**63]),)), "values along an axis"),
    ("tensor that overflows", gguf(tensors=(tensor("a", [2**47] * 4),)), "truncated"),
    ("tensor of type 99", gguf(tensors=(tensor("a", [8], 99),)), "unknown type 99"),
    ("tensor of type 4", gguf(tensors=(tensor("a", [32], 4),)), "unknown type 4"),
    ("tensor of odd rows", gguf(tensors=(tensor("a", [33], 8),), data=bytes(99)), "block of 32"),
    ("tensor beyond the end", gguf(ARCH, tensors=ONE), "truncated"),
    ("tensor far away", gguf(ARCH, tensors=(tensor("a", [8], 0, 2**60),)), "truncated"),
    ("tensor between", gguf(tensors=(tensor("a", [8], 0, 4),), data=bytes(99)), "misplaced"),
    ("tensors overlap", gguf(tensors=(*ONE, tensor("b", [8])), data=bytes(99)), "misplaced"),
    ("tensor twice", gguf(tensors=(*ONE, tensor("a", [8], 0, 32)), data=bytes(99)), "twice"),
    ("tensor name not UTF-8", gguf(tensors=(tensor(b"\xff", [8]),)), "not UTF-8"),
    ("tensor name of 2^60", gguf(tensors=(struct.pack("<Q", 2**60),)), "bytes in a string"),
    ("tensor name of a newline", gguf(ARCH, tensors=(tensor("a\nb", [8]),), data=bytes(32)),
     "a\\nb is not one of the model's"),
    ("tensor of integers", gguf(ARCH, tensors=(tensor("a", [8], 26),), data=bytes(32)),
     "not one of the model's"),
    ("architecture a list", gguf(key("general.architecture", ARRAY, struct.pack("<IQB", 0, 1, 1))),
     "general.architecture is [1]"),
    ("expert count a text", gguf(ARCH, key("qwen3moe.expert_count", STRING, text("a\nb"))),
     "expert_count is 'a\\nb'"),
    ("nothing but an architecture", gguf(ARCH), "is missing"),
    *[(f"cut at {n}", HALF[:n], "truncated") for n in (7, 15, 23, 40, 60, 80, 90, 130, 150, 190)],
]  # fmt: skip


def imatrix(change: Callable[[Imatrix], Any], name: str = "imatrix.gguf") -> Build:
    """`quantize` with an importance matrix that is edited."""

    def build(room: Room) -> list[Any]:
        path = room.copy("imatrix.gguf")
        found = load_imatrix(path)
        found = change(found) or found
        path.unlink()
        (save_dat if name.endswith(".dat") else save_gguf)(found, room.folder / name)
        return ["quantize", room.copy("qwen3"), "--imatrix", room.folder / name, *QUANTIZE]

    return build


def imatrix_bytes(content: bytes, name: str = "i.dat") -> Build:
    return lambda room: [
        "quantize", room.copy("qwen3"), "--imatrix", room.write(name, content), *QUANTIZE,
    ]  # fmt: skip


def fill(value: float) -> Callable[[Imatrix], None]:
    def change(found: Imatrix) -> None:
        found.entries[ROUTER].sums[0, 3] = value

    return change


def entry(sums: Any, counts: Any, name: str = "blk.0.attn_q.weight") -> Callable[[Imatrix], None]:
    def change(found: Imatrix) -> None:
        values = np.asarray(sums, np.float32), np.asarray(counts)
        found.entries[name] = ImatrixEntry(name, *values)

    return change


def dat(n: int, *entries: bytes, end: bytes = b"") -> bytes:
    return struct.pack("<i", n) + b"".join(entries) + end


def dat_entry(name: bytes, calls: int, size: int, values: bytes) -> bytes:
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, size) + values


def sparse_imatrix(room: Room) -> list[Any]:
    """A .dat whose one entry has two thousand million values, all zero."""
    begin = dat(1, dat_entry(b"a", 1, 2**31 - 1, b""))
    path = room.sparse("i.dat", 2**34, begin)
    return ["quantize", room.copy("qwen3"), "--imatrix", path, *QUANTIZE]


def sparse_sums(room: Room) -> list[Any]:
    """The same as GGUF."""
    kind = key("general.type", STRING, text("imatrix"))
    infos = (tensor("a.counts", [1, 1]), tensor("a.in_sum2", [2**31, 1], 0, 32))
    path = room.sparse("i.gguf", 2**34, gguf(kind, tensors=infos))
    return ["quantize", room.copy("qwen3"), "--imatrix", path, *QUANTIZE]


ROUTER = "blk.0.ffn_gate_inp.weight"
ROW = dat_entry(b"blk.0.attn_q.weight", 1, 64, bytes(256))
KIND = key("general.type", STRING, text("imatrix"))
OTHER = {"sums NaN": float("nan"), "sums infinite": float("inf"), "sums negative": -1.0}
CHUNKS = key("imatrix.chunk_count", U64, struct.pack("<Q", 2**40))
IMATRICES = [
    *[Case(f"imatrix {name}", imatrix(fill(value)), "NaN, infinite or negative")
      for name, value in OTHER.items()],
    *[Case(f"dat {name}", imatrix(fill(value), "i.dat"), "NaN, infinite or negative")
      for name, value in OTHER.items()],
    Case("imatrix counts NaN", imatrix(entry([[1] * 64], [float("nan")])), "its counts"),
    Case("imatrix counts negative", imatrix(entry([[1] * 64], [-1])), "its counts"),
    Case("imatrix counts broken", imatrix(entry([[1] * 64], [0.5])), "its counts"),
    Case("imatrix counts too many", imatrix(entry([[1] * 64], [1, 1])), "2 counts"),
    Case("imatrix of another width", imatrix(entry([[1] * 32], [1])), "of another model"),
    Case("imatrix of more experts", imatrix(
        entry([[1] * 64] * 9, [1] * 9, "blk.0.ffn_up_exps.weight")), "of another model"),
    Case("imatrix of a foreign tensor", imatrix(entry([[1] * 64], [1], "x\ny")), "x\\ny"),
    Case("imatrix of nothing", imatrix(lambda found: Imatrix({}, "", 0, 0)), "without entries"),
    Case("dat of another width", imatrix(entry([[1] * 32], [1]), "i.dat"), "of another model"),
    Case("imatrix a model", lambda room: [
        "quantize", room.copy("qwen3"), "--imatrix",
        room.copy("build") / "name-GGUF" / "name-Q8_0.gguf", *QUANTIZE], "is not imatrix"),
    Case("imatrix sums alone", imatrix_bytes(
        gguf(KIND, tensors=(tensor("a.in_sum2", [8, 1]),), data=bytes(32))), "no counts"),
    Case("imatrix sums of half", imatrix_bytes(gguf(KIND, tensors=(
        tensor("a.counts", [1, 1]), tensor("a.in_sum2", [8, 1], 1, 32)), data=bytes(64))), "F16"),
    Case("imatrix chunks 2^40", imatrix_bytes(gguf(KIND, CHUNKS)), "imatrix.chunk_count"),
    Case("imatrix chunks a text", imatrix_bytes(
        gguf(KIND, key("imatrix.chunk_count", STRING, text("4")))), "imatrix.chunk_count"),
    Case("imatrix datasets a number", imatrix_bytes(
        gguf(KIND, key("imatrix.datasets", U32, bytes(4)), ARCH)), "imatrix"),
    Case("imatrix truncated", imatrix_bytes(gguf(KIND, tensors=ONE)), "truncated"),
    Case("dat empty", imatrix_bytes(b""), "truncated"),
    Case("dat of text", imatrix_bytes(b"this is no importance matrix"), "not an imatrix"),
    Case("dat of zeros", imatrix_bytes(bytes(1000)), "0 entries"),
    Case("dat minus one entries", imatrix_bytes(dat(-1)), "-1 entries"),
    Case("dat 2^31 entries", imatrix_bytes(dat(2**31 - 1)), "entries; this is not an imatrix"),
    Case("dat fewer entries", imatrix_bytes(dat(2, ROW)), "truncated"),
    Case("dat name negative", imatrix_bytes(dat(1, struct.pack("<i", -5))), "-5 bytes"),
    Case("dat name of 2^31", imatrix_bytes(dat(1, struct.pack("<i", 2**31 - 1))), "not an imatrix"),
    Case("dat size negative", imatrix_bytes(dat(1, dat_entry(b"a", 1, -1, b""))), "-1 values"),
    Case("dat size zero", imatrix_bytes(dat(1, dat_entry(b"a", 1, 0, b""))), "0 values"),
    Case("dat size beyond", imatrix_bytes(dat(1, dat_entry(b"a", 1, 10**6, b"1"))), "truncated"),
    Case("dat calls negative", imatrix_bytes(dat(1, dat_entry(b"a", -1, 1, bytes(4)))), "-1 calls"),
    Case("dat twice", imatrix_bytes(dat(2, ROW, ROW)), "occurs twice"),
    Case("dat last chunk negative", imatrix_bytes(
        dat(1, ROW, end=struct.pack("<ii", -7, 0))), "last chunk is -7"),
    Case("dat dataset beyond", imatrix_bytes(
        dat(1, ROW, end=struct.pack("<ii", 1, 4000))), "truncated"),
    Case("dat goes on", imatrix_bytes(
        dat(1, ROW, end=struct.pack("<ii", 1, 0) + b"more")), "after its end"),
    Case("dat sparse", sparse_imatrix, "2147483647 values"),
    Case("imatrix sparse", sparse_sums, "sums, expected at most"),
    Case("dat of zeros, sparse", lambda room: [
        "quantize", room.copy("qwen3"), "--imatrix", room.sparse("i.dat", 2**40), *QUANTIZE],
        "0 entries"),
]  # fmt: skip
GGUFS = [
    *[Case(f"gguf {name}", verify_file(content), words, code=1)
      for name, content, words in VERIFIED],
    Case("gguf of long keys, sparse", sparse_keys, "bytes", code=1),
    Case("gguf sparse", lambda room: [
        "verify", room.copy("qwen3"), room.sparse("x.gguf", 2**40)], "begins with", code=1),
    Case("gguf cut in its data", real(lambda raw: raw[:-64]), "truncated", code=1),
    Case("gguf cut in its header", real(lambda raw: raw[:5000]), "array items, expected", code=1),
    Case("gguf of NaN", real(lambda raw: raw[:-64] + b"\xff" * 64), "NaN", code=1),
    Case("gguf of other experts", real(lambda raw: raw.replace(
        key("qwen3moe.expert_used_count", U32, struct.pack("<I", 2)),
        key("qwen3moe.expert_used_count", U32, struct.pack("<I", 9)))), "expected 1 to 8", code=1),
    Case("gguf of negative experts", real(lambda raw: raw.replace(
        key("qwen3moe.expert_count", U32, struct.pack("<I", 8)),
        key("qwen3moe.expert_count", I32, struct.pack("<i", -8)))), "expert_count is -8", code=1),
]  # fmt: skip
