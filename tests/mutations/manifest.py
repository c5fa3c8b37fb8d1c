"""Group M: the manifest, one field after another, and SHA256SUMS."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from reap2gguf.bundle.layout import MANIFEST_FILE, SUMS_FILE
from tests.mutations.damage import Absent, Copy, Damage, Fix, Sight
from tests.mutations.gguf_keys import another
from tests.mutations.models import Sound

Step = str | int
Change = Callable[[dict[str, Any]], object]
# What the source can tell and nothing else.
_OF_SOURCE = {("source", "fingerprint"), ("source", "n_parameters"), ("source", "n_bytes")}
# Records of how the bundle was made: no file depends on them, and the source does not tell them.
# A card may show some, in other words.
_RECORDS = {
    ("program", "python"), ("program", "torch"), ("program", "transformers"),
    ("program", "safetensors"), ("program", "gguf"), ("program", "numpy"),
    ("program", "tokenizers"), ("program", "ggml"), ("pruning", "observations_sha256"),
    ("calibration", "sha256"), ("pruning", "mtp", "hits_before"), ("pruning", "mtp", "hits_after"),
    ("pruning", "mtp", "n_tokens"), ("options", "samples"), ("options", "max_length"),
    ("options", "chunk"),
}  # fmt: skip


def damages(sound: Sound) -> Iterator[Damage]:
    """Every single value; of tables by tensor and of file hashes, the first alone."""
    manifest = json.loads((sound.gguf / MANIFEST_FILE).read_text())
    for path, value in _leaves(manifest):
        fix = Fix.SUMS if path[:2] == ("hf", "files") else Fix.ALL
        sight = Sight.SOURCE if path in _OF_SOURCE else Sight.BESIDE
        is_record = path[0] == "made_with" or path[:2] == ("options", "inputs")
        if path in _RECORDS or is_record:
            sight = Sight.RECORD
        title = ".".join(map(str, path))
        apply = _manifest(_set(path, _another(value)))
        yield Damage("M", f"{title}: another value", apply, sight, fix=fix)
    for title, change in _MORE:
        yield Damage("M", title, _manifest(change))
    for title, apply in _FILES:
        yield Damage("M", title, apply, fix=Fix.NONE)
    for title, apply in _UNFIXED:
        yield Damage("M", f"{title}, hashes as before", apply, fix=Fix.NONE)
    yield Damage("M", "the two manifests differ", _differ, fix=Fix.SUMS)


def _leaves(values: Any, above: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """Where each plain value is; lists of plain values and of expert ids count as one."""
    if isinstance(values, dict) and values:
        items = list(values.items())
        if above[-1:] == ("tensors",) or above == ("hf", "files"):
            items = items[:1]  # of many alike, the first
        for name, value in items:
            yield from _leaves(value, (*above, name))
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for number, value in enumerate(values):
            yield from _leaves(value, (*above, number))
    else:
        yield above, values


def _another(value: Any) -> Any:
    if value is None:
        return "x"
    if value in ([], {}):
        return {"x": "x"} if value == {} else ["x"]
    return another(value)


def _set(path: tuple[Step, ...], value: Any) -> Change:
    def change(values: Any) -> None:
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = value

    return change


def _manifest(change: Change) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_manifest() as manifest:
            change(manifest)

    return apply


def _kept(change: Callable[[dict[str, list[int]]], object]) -> Change:
    return lambda manifest: change(manifest["pruning"]["kept"])


def _dropped(kept: list[int]) -> int:
    """An expert that was not kept."""
    return next(expert for expert in range(len(kept) + 1) if expert not in kept)


def _protect(name: str, which: Callable[[list[int]], int]) -> Change:
    """Another protected expert in layer 0."""
    return lambda m: m["pruning"].update({name: {"0": [which(m["pruning"]["kept"]["0"])]}})


def _other_recipe(manifest: dict[str, Any]) -> None:
    """The recipe of one file as that of the other, whose types stay."""
    manifest["gguf"][1]["recipe_source"] = manifest["gguf"][0]["recipe_source"]


def _exchange_files(manifest: dict[str, Any]) -> None:
    first, second = manifest["gguf"][:2]
    first["file"], second["file"] = second["file"], first["file"]


def _drop_sides(manifest: dict[str, Any]) -> None:
    if not manifest["side_files"]:
        raise Absent("no side files")
    manifest["side_files"] = []


_MORE: list[tuple[str, Change]] = [
    ("kept: an expert fewer", _kept(lambda kept: kept["0"].pop())),
    ("kept: an expert twice", _kept(lambda kept: kept["0"].__setitem__(1, kept["0"][0]))),
    ("kept: not sorted", _kept(lambda kept: kept["1"].reverse())),
    ("kept: beyond the last expert", _kept(lambda kept: kept["0"].__setitem__(-1, 8))),
    ("kept: far beyond", _kept(lambda kept: kept["1"].__setitem__(-1, 2**31 - 1))),
    (
        "kept: another expert",
        _kept(lambda k: k.update({"0": sorted([*k["0"][1:], _dropped(k["0"])])})),
    ),
    ("kept: a layer lost", _kept(lambda kept: kept.pop("1"))),
    ("kept: a layer too many", _kept(lambda kept: kept.update({"7": kept["1"]}))),
    ("kept: layers exchanged", _kept(lambda k: k.update({"0": k["1"], "1": k["0"]}))),
    ("kept: a layer's number in other digits", _kept(lambda k: k.update({"1_0": k["1"]}))),
    ("kept: empty", _kept(lambda kept: kept.clear())),
    ("protected: an expert that is gone", _protect("protected", lambda kept: _dropped(kept))),
    ("protected: one that nobody named", _protect("protected", lambda kept: kept[0])),
    ("protected: beyond the last expert", _protect("protected", lambda kept: 8)),
    ("super experts: one that is gone", _protect("super_experts", lambda kept: _dropped(kept))),
    ("super experts: nobody asked for any", _protect("super_experts", lambda kept: kept[0])),
    ("options.protect names another", lambda m: m["options"].update(protect="0:0-1")),
    ("options.protect names nothing", lambda m: m["options"].update(protect="zero")),
    ("recipe_source of the other file", _other_recipe),
    ("recipe_source empty", lambda m: m["gguf"][1].update(recipe_source="")),
    ("files exchanged", _exchange_files),
    ("a file not listed", lambda m: m["gguf"].pop()),
    ("no file listed", lambda m: m.update(gguf=[])),
    ("side files not listed", _drop_sides),
    ("a tensor not listed", lambda m: m["gguf"][1]["tensors"].pop("output_norm.weight")),
    ("a tensor too many", lambda m: m["gguf"][1]["tensors"].update({"blk.9.x.weight": "F32"})),
    ("parts listed that are one file", lambda m: m["gguf"][1].update(parts=[m["gguf"][1]["file"]])),
    ("the number of experts zero", lambda m: m["pruning"].update(n_experts=0)),
    ("another format", lambda m: m.update(format=2)),
    ("an unknown field", lambda m: m["pruning"].update(unknown=1)),
    ("a count as a float", lambda m: m["pruning"].update(n_kept=float(m["pruning"]["n_kept"]))),
    ("source removed", lambda m: m.pop("source")),
    ("verification emptied", lambda m: m.update(verification={})),
]


def _sums(change: Callable[[list[str]], object]) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_text(copy.gguf / SUMS_FILE) as lines:
            change(lines)

    return apply


def _wrong(line: str) -> str:
    return ("0" if line[0] != "0" else "1") + line[1:]


_FILES: list[tuple[str, Callable[[Copy], None]]] = [
    ("SHA256SUMS: a wrong hash", _sums(lambda lines: lines.__setitem__(2, _wrong(lines[2])))),
    (
        "SHA256SUMS: a name twice, the first wrong",
        _sums(lambda lines: lines.insert(0, _wrong(lines[0]))),
    ),
    (
        "SHA256SUMS: a name twice, the last wrong",
        _sums(lambda lines: lines.append(_wrong(lines[0]))),
    ),
    ("SHA256SUMS: a line lost", _sums(lambda lines: lines.pop(0))),
    (
        "SHA256SUMS: a file that is not there",
        _sums(lambda lines: lines.append("0" * 64 + "  gone.gguf\n")),
    ),
    ("SHA256SUMS: a path", _sums(lambda lines: lines.append("0" * 64 + "  ../x\n"))),
    ("SHA256SUMS: not a line", _sums(lambda lines: lines.append("hello\n"))),
    ("SHA256SUMS: empty", _sums(lambda lines: lines.clear())),
    ("SHA256SUMS lost", lambda copy: _lose(copy, SUMS_FILE)),
    ("manifest of the GGUF folder lost", lambda copy: _lose(copy, MANIFEST_FILE)),
]


def _lose(copy: Copy, name: str) -> None:
    if not (copy.gguf / name).is_file():
        raise Absent(f"no {name} yet")
    os.unlink(copy.gguf / name)


def _append(name: str, in_hf: bool = False) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        path = (copy.hf if in_hf else copy.gguf) / name
        if not path.is_file():
            raise Absent(f"no {name}")
        copy.put(path, path.read_bytes() + b"\n")

    return apply


_UNFIXED: list[tuple[str, Callable[[Copy], None]]] = [
    ("a line more in calibration.txt", _append("calibration.txt")),
    ("a line more in the Modelfile", _append("Modelfile")),
    ("a line more in the GGUF card", _append("README.md")),
    ("a line more in the safetensors' card", _append("README.md", in_hf=True)),
    ("a line more in config.json", _append("config.json", in_hf=True)),
    ("a line more in tokenizer.json", _append("tokenizer.json", in_hf=True)),
    ("a byte more in imatrix.dat", _append("imatrix.dat")),
    ("a space more in one manifest", lambda copy: _append(MANIFEST_FILE)(copy)),
]


def _differ(copy: Copy) -> None:
    with copy.edit_json(copy.hf / MANIFEST_FILE) as manifest:
        manifest["source"]["label"] += "x"
