"""Group I: the importance matrix, its text, the GGUF card and the Modelfile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
from gguf import GGUFValueType

from tests.mutations.damage import Absent, Copy, Damage, Sight
from tests.mutations.gguf_edit import GgufEdit, Key
from tests.mutations.models import Sound

Apply = Callable[[Copy], None]


def damages(sound: Sound) -> Iterator[Damage]:
    for title, apply in (*_IMATRIX, *_DAT, *_TEXTS):
        yield Damage("I", title, apply)
    yield Damage(
        "I", "GGUF card: another licence", _text("README.md", "apache-2.0", "mit"), Sight.SOURCE
    )


def _imatrix(edit: Callable[[GgufEdit], object]) -> Apply:
    def apply(copy: Copy) -> None:
        with copy.edit_gguf(copy.gguf / "imatrix.gguf") as gguf:
            edit(gguf)

    return apply


def _entry(ending: str, change: Callable[[np.ndarray], np.ndarray]) -> Apply:
    """Change the sums or counts of the experts' first entry."""

    def edit(gguf: GgufEdit) -> None:
        name = next(n for n in gguf.tensors if n.endswith(f"ffn_down_exps.weight.{ending}"))
        tensor = gguf.tensors[name]
        tensor.put(change(tensor.values()))

    return _imatrix(edit)


def _first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[0] = value
        return values

    return change


def _all_times(factor: float) -> Apply:
    def edit(gguf: GgufEdit) -> None:
        for name, tensor in gguf.tensors.items():
            if name.endswith(".in_sum2"):
                tensor.put(tensor.values() * np.float32(factor))

    return _imatrix(edit)


def _without(ending: str) -> Apply:
    def edit(gguf: GgufEdit) -> None:
        gguf.tensors = {n: t for n, t in gguf.tensors.items() if ending not in n}

    return _imatrix(edit)


def _layers_exchanged(gguf: GgufEdit) -> None:
    first, second = (f"blk.{i}.ffn_gate_exps.weight.in_sum2" for i in (0, 1))
    one, other = gguf.tensors[first], gguf.tensors[second]
    one.data, other.data = other.data, one.data


def _more(gguf: GgufEdit) -> None:
    for ending in ("in_sum2", "counts"):
        gguf.tensors[f"blk.9.x.weight.{ending}"] = gguf.tensors[
            f"blk.0.ffn_gate_exps.weight.{ending}"
        ]


def _key(name: str, key: Key | None) -> Apply:
    def edit(gguf: GgufEdit) -> None:
        if key is None:
            del gguf.keys[name]
        else:
            gguf.keys[name] = key

    return _imatrix(edit)


def _put(name: str, contents: bytes) -> Apply:
    return lambda copy: _existing(copy, name) and copy.put(copy.gguf / name, contents)


def _existing(copy: Copy, name: str) -> bool:
    if not (copy.gguf / name).is_file():
        raise Absent(f"no {name} yet")
    return True


def _lose(*names: str) -> Apply:
    def apply(copy: Copy) -> None:
        for name in names:
            _existing(copy, name)
            os.unlink(copy.gguf / name)

    return apply


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Apply:
    def apply(copy: Copy) -> None:
        _existing(copy, name)
        path = copy.gguf / name
        copy.put(path, change(path.read_bytes()))

    return apply


def _text(name: str, old: str, new: str) -> Apply:
    def change(raw: bytes) -> bytes:
        if old.encode() not in raw:
            raise Absent(f"no {old} in {name}")
        return raw.replace(old.encode(), new.encode())

    return _bytes(name, change)


def _append(name: str, text: str) -> Apply:
    return _bytes(name, lambda raw: raw + text.encode())


def _from_other(copy: Copy) -> None:
    first, second = copy.sound.exact, copy.sound.quantized
    _text("Modelfile", f"FROM ./{first}\n# FROM ./{second}", f"FROM ./{second}\n# FROM ./{first}")(
        copy
    )


_U32, _ARRAY, _STRING = GGUFValueType.UINT32, GGUFValueType.ARRAY, GGUFValueType.STRING
_IMATRIX: list[tuple[str, Apply]] = [
    ("imatrix: a NaN", _entry("in_sum2", _first(float("nan")))),
    ("imatrix: a negative sum", _entry("in_sum2", _first(-1))),
    ("imatrix: experts rotated", _entry("in_sum2", lambda v: np.roll(v, 1, axis=0))),
    ("imatrix: columns reversed", _entry("in_sum2", lambda v: v[:, ::-1])),
    ("imatrix: one sum doubled", _entry("in_sum2", lambda v: _first(v.reshape(-1)[0] * 2)(v))),
    ("imatrix: all sums doubled", _all_times(2)),
    ("imatrix: all sums zero", _all_times(0)),
    ("imatrix: counts zero", _entry("counts", np.zeros_like)),
    ("imatrix: counts one more", _entry("counts", lambda v: v + 1)),
    ("imatrix: layers exchanged", _imatrix(_layers_exchanged)),
    ("imatrix: an entry lost", _without("blk.0.ffn_gate_exps")),
    ("imatrix: counts lost", _without("ffn_gate_exps.weight.counts")),
    ("imatrix: an entry too many", _imatrix(_more)),
    ("imatrix: another dataset", _key("imatrix.datasets", Key(_ARRAY, ["other.txt"], _STRING))),
    ("imatrix: another chunk_count", _key("imatrix.chunk_count", Key(_U32, 99))),
    ("imatrix: another chunk_size", _key("imatrix.chunk_size", Key(_U32, 99))),
    ("imatrix: no chunk_count", _key("imatrix.chunk_count", None)),
    ("imatrix: a model's type", _key("general.type", Key(_STRING, "model"))),
    ("imatrix: four bytes", _put("imatrix.gguf", b"GGUF")),
    ("imatrix: no bytes", _put("imatrix.gguf", b"")),
    ("imatrix: cut off", _bytes("imatrix.gguf", lambda raw: raw[:-64])),
    (
        "imatrix: the model's file",
        lambda copy: copy.put(copy.gguf / "imatrix.gguf", copy.exact.read_bytes()),
    ),
    ("imatrix.gguf lost", _lose("imatrix.gguf")),
    ("imatrix.gguf and .dat lost", _lose("imatrix.gguf", "imatrix.dat")),
]
_DAT: list[tuple[str, Apply]] = [
    ("imatrix.dat lost", _lose("imatrix.dat")),
    ("imatrix.dat: garbage", _put("imatrix.dat", b"\x07" * 5000)),
    ("imatrix.dat: no bytes", _put("imatrix.dat", b"")),
    ("imatrix.dat: cut off", _bytes("imatrix.dat", lambda raw: raw[:-100])),
    (
        "imatrix.dat: a value changed",
        _bytes("imatrix.dat", lambda raw: raw[:600] + bytes([raw[600] ^ 0x40]) + raw[601:]),
    ),
    ("imatrix.dat: another text", _bytes("imatrix.dat", lambda raw: raw[:-1] + b"x")),
]
_TEXTS: list[tuple[str, Apply]] = [
    ("calibration.txt: another text", _put("calibration.txt", b"Another text.\n" * 400)),
    ("calibration.txt: a line more", _append("calibration.txt", "\n")),
    ("calibration.txt: cut off", _bytes("calibration.txt", lambda raw: raw[:-20])),
    ("calibration.txt: empty", _put("calibration.txt", b"")),
    ("calibration.txt lost", _lose("calibration.txt")),
    ("Modelfile: FROM another file", _text("Modelfile", "FROM ./", "FROM ./../")),
    ("Modelfile: FROM the second file", _from_other),
    ("Modelfile: FROM the network", _text("Modelfile", "FROM ./", "FROM hf.co/x/")),
    ("Modelfile: another temperature", _text("Modelfile", "temperature 0.6", "temperature 1.9")),
    ("Modelfile: a stop lost", _text("Modelfile", 'PARAMETER stop "<|endoftext|>"\n', "")),
    ("Modelfile: SYSTEM", _append("Modelfile", 'SYSTEM "Obey."\n')),
    ("Modelfile: TEMPLATE", _append("Modelfile", 'TEMPLATE "{{ .Prompt }}"\n')),
    ("Modelfile: ADAPTER", _append("Modelfile", "ADAPTER ./imatrix.gguf\n")),
    ("Modelfile: empty", _put("Modelfile", b"")),
    ("Modelfile lost", _lose("Modelfile")),
    ("GGUF card: another count", _text("README.md", "6 of 8", "7 of 8")),
    ("GGUF card: another file", _text("README.md", "llama-cli -m ", "llama-cli -m other-")),
    ("GGUF card: another size", _text("README.md", "iB |", "iB more |")),
    ("GGUF card: a link more", _append("README.md", "\n[more](http://example.com)\n")),
    ("GGUF card: empty", _put("README.md", b"")),
    ("GGUF card lost", _lose("README.md")),
]
