"""Facts that a bundle holds twice: each is changed in one place, hashes fixed, and found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.layout import OBSERVATIONS_FILE
from reap2gguf.bundle.sums import write_sums
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, load_imatrix, save_both, save_gguf
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from tests.conftest import Bundle
from tests.verifying.mutations import change_manifest, copied, fix_hashes, own, rewrite

Values = dict[str, Any]


@pytest.fixture
def light(built: Bundle, tmp_path: Path) -> Bundle:
    """A copy that costs nothing: its files are links to those of the finished bundle."""
    return copied(built, tmp_path / "build")


# values are compared elsewhere, and take most of the time
HEADERS_ONLY = Strictness(reads_values=False)


def violations(bundle: Bundle) -> tuple[str, ...]:
    return verify_bundle(bundle.gguf, 1, Silent(), HEADERS_ONLY).violations


def put(*path: str | int, value: Any) -> Callable[[Values], None]:
    """A change of one value of the manifest."""

    def change(values: Values) -> None:
        target: Any = values
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def lose_a_layer(values: Values) -> None:
    del values["pruning"]["kept"]["2"]


def swap_layers(values: Values) -> None:
    kept = values["pruning"]["kept"]
    kept["0"], kept["1"] = kept["1"], kept["0"]


def all_experts_q2(values: Values) -> None:
    tensors = values["gguf"][0]["tensors"]
    tensors.update({name: "Q2_K" for name in tensors if "_exps" in name})


IDS = [0, 1, 2, 5, 6, 7, 8, 9, 11, 12, 14, 15]
MANIFEST = [
    (put("name", value="another"), "gguf.file is 'example-IQ4_K_M.gguf'"),
    (put("program", "reap2gguf", value="9.9"), "reap2gguf.version is '0.1.0', expected '9.9'"),
    (put("source", "label", value="other"), "reap2gguf.source is 'tiny-qwen3-moe'"),
    (put("source", "architecture", value="X"), "source.architecture is 'X'"),
    (put("pruning", "method", value="frequency"), "reap2gguf.method is 'reap'"),
    (put("pruning", "method", value="none"), "pruning.method is 'none', expected one of"),
    (put("pruning", "n_experts", value=17), "reap2gguf.source_expert_count is 16, expected 17"),
    (put("pruning", "n_experts", value=0), "n_experts is 0, expected a number from 1"),
    (put("pruning", "n_kept", value=11), "pruning.kept of layer 0 is '12 experts', expected 11"),
    (put("pruning", "experts_per_token", value=5), "pruning.experts_per_token is 5, expected 4"),
    (
        put("pruning", "experts_per_token", value=0),
        "experts_per_token is 0, expected a number from 1 to 12",
    ),
    (put("pruning", "kept", "0", value=IDS[:-1]), "kept of layer 0 is '11 experts'"),
    (
        put("pruning", "kept", "0", value=[*IDS[:-1], 16]),
        "kept has expert 16 in layer 0, expected numbers below 16",
    ),
    (put("pruning", "kept", "0", value=[0, *IDS[:-1]]), "expected ascending numbers"),
    (put("pruning", "kept", "0", value=[*IDS[1:], 0]), "expected ascending numbers"),
    (put("pruning", "kept", "0", value=list(range(12))), "reap2gguf.kept_experts is"),
    (put("pruning", "kept", value={}), "pruning.kept is {}"),
    (lose_a_layer, "the layers of pruning.kept is [0, 1, 3]"),
    (swap_layers, "reap2gguf.kept_experts is"),
    (put("pruning", "n_rows", value=14), "pruning.n_rows is 14, expected 15"),
    (put("pruning", "n_tokens", value=1), "pruning.n_tokens is 1, expected 7680"),
    (
        put("pruning", "n_dropped_rows", value=16),
        "n_dropped_rows is 16, expected a number from 0 to 15",
    ),
    (put("pruning", "mtp", "state", value="pruned"), "pruning.mtp.state is 'pruned'"),
    (put("pruning", "mtp", "state", value="?"), "expected one of none, pruned, kept, dropped"),
    (put("calibration", "spec", value="other.txt"), "README.md is not what this program writes"),
    (put("calibration", "seed", value=1), "README.md is not what this program writes"),
    (put("calibration", "max_length", value=99), "README.md is not what this program writes"),
    (put("calibration", "packed", value=True), "README.md is not what this program writes"),
    (put("calibration", "imatrix_text", value="x"), "imatrix.datasets is 'prose.txt'"),
    (put("calibration", "imatrix_sha256", value="0" * 64), "calibration.txt is not the text"),
    (put("calibration", "imatrix_chunks", value=14), "imatrix.chunk_count is 15, expected 14"),
    (put("calibration", "imatrix_chunk_size", value=9), "imatrix.chunk_size is 512, expected 9"),
    (put("hf", "n_shards", value=2), "hf.n_shards is 2, expected 1"),
    (put("hf", "n_parameters", value=1), "hf.n_parameters is 1, expected 11287296"),
    (put("hf", "n_bytes", value=1), "hf.n_bytes is 1, expected 22574592"),
    (put("hf", "files", "config.json", "n_bytes", value=1), "config.json has 920 bytes"),
    (put("gguf", value=[]), "gguf is empty, expected the record of at least one file"),
    (put("gguf", 0, "recipe", value="q4km"), "reap2gguf.recipe is 'unsloth-iq4km'"),
    (put("gguf", 0, "title", value="Best"), "title is 'Best'"),
    (put("gguf", 0, "label", value="Q8_0"), "expected 'example-Q8_0.gguf' by its name and label"),
    (put("gguf", 0, "file_type", value="Q8_0"), "file_type is 'Q8_0', expected 'Q4_K_M'"),
    (put("gguf", 0, "file_type", value="Q99"), "file_type is 'Q99'"),
    (put("gguf", 0, "recipe_source", value=""), "recipe_source of example-IQ4_K_M.gguf"),
    (put("gguf", 0, "recipe_source", value="[" * 99), "not valid TOML"),
    (put("gguf", 0, "n_bytes", value=1), "example-IQ4_K_M.gguf: n_bytes is 1"),
    (put("gguf", 0, "bits_per_weight", value=4.0), "bits_per_weight is 4.0, expected 5.1991"),
    (put("gguf", 1, "parts", value=["a.gguf"]), "parts is ['a.gguf']"),
    (put("options", "keep_experts", value=11), "options.keep_experts is 11, expected None or 12"),
    (put("options", "compression", value=0.5), "options.compression keeps is 8, expected 12"),
    (put("options", "name", value="x"), "options.name is 'x', expected None or example"),
    (put("options", "method", value="ean_sum"), "options.method is 'ean_sum', expected reap"),
    (put("options", "mtp", value="keep"), "options.mtp is 'keep', expected prune or drop"),
    (put("options", "spec", value="x.txt"), "options.spec is 'x.txt', expected prose.txt"),
    (put("options", "max_length", value=9), "options.max_length is 9, expected 512"),
    (put("options", "seed", value=1), "options.seed is 1, expected 42"),
    (put("options", "pack", value=True), "options.pack is True, expected False"),
    (put("options", "imatrix_text", value="x"), "options.imatrix_text is 'x'"),
    (put("options", "chunk", value=8), "options.chunk is 8, expected 512"),
    (put("options", "imatrix_chunks", value=1), "options.imatrix_chunks is 1"),
    (put("options", "device", value="tpu"), "options.device is 'tpu', expected cpu or cuda"),
    (put("options", "dtype", value="auto"), "options.dtype is 'auto', expected float32 or"),
    (put("verification", value={}), "verification.passed is None"),
    (put("verification", "summary", value="all good"), "verification.summary is 'all good'"),
    (put("verification", "passed", 1, value="x"), "verification.passed is"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), MANIFEST, ids=[named for _, named in MANIFEST])
def test_a_changed_manifest_disagrees(
    change: Callable[[Values], None], named: str, light: Bundle
) -> None:
    change_manifest(light, change)
    found = violations(light)
    assert any(named in violation for violation in found), found


def test_the_untouched_copy_is_sound(light: Bundle) -> None:
    change_manifest(light, lambda values: None)
    report = verify_bundle(light.gguf, 1, Silent())
    assert report.violations == ()


def test_types_that_the_recipe_does_not_give(light: Bundle) -> None:
    """As of a file that was quantized by another recipe under this one's name."""
    change_manifest(light, all_experts_q2)
    found = violations(light)
    assert any("its recipe gives" in one and "(12 such tensors)" in one for one in found), found


def test_another_recipe_under_the_same_name(light: Bundle) -> None:
    def change(values: Values) -> None:
        source = values["gguf"][0]["recipe_source"]
        values["gguf"][0]["recipe_source"] = source.replace("Q8_0", "Q6_K")

    change_manifest(light, change)
    assert any("its recipe gives" in one for one in violations(light))


def set_string(path: Path, key: str, value: bytes) -> None:
    """Overwrite the string under a key by one of the same length."""

    def change(raw: bytes) -> bytes:
        at = raw.index(key.encode()) + len(key) + 4  # past the value's type
        length = int.from_bytes(raw[at : at + 8], "little")
        assert length == len(value)
        return raw[: at + 8] + value + raw[at + 8 + length :]

    rewrite(path, change)


def set_number(path: Path, key: str, value: int) -> None:
    def change(raw: bytes) -> bytes:
        at = raw.index(key.encode()) + len(key) + 4
        return raw[:at] + value.to_bytes(4, "little") + raw[at + 4 :]

    rewrite(path, change)


HEADERS = [
    ("general.type", b"lodel", "general.type is 'lodel', expected 'model'"),
    ("general.name", b"exampla", "general.name is 'exampla', expected 'example'"),
    ("reap2gguf.version", b"0.1.1", "reap2gguf.version is '0.1.1', expected '0.1.0'"),
    ("reap2gguf.source", b"tiny-qwen3-mox", "reap2gguf.source is 'tiny-qwen3-mox'"),
    ("reap2gguf.method", b"rexp", "reap2gguf.method is 'rexp', expected 'reap'"),
    ("reap2gguf.recipe", b"unsloth-iq4ks", "reap2gguf.recipe is 'unsloth-iq4ks'"),
    ("quantize.imatrix.file", b"imatrix.dat.", "quantize.imatrix.file is 'imatrix.dat.'"),
    ("quantize.imatrix.dataset", b"prosa.txt", "quantize.imatrix.dataset is 'prosa.txt'"),
]


@pytest.mark.parametrize(("key", "value", "named"), HEADERS, ids=[key for key, _, _ in HEADERS])
def test_a_changed_header_disagrees(key: str, value: bytes, named: str, light: Bundle) -> None:
    path = light.gguf / "example-IQ4_K_M.gguf"
    if key == "quantize.imatrix.file":
        value = value[: len(b"imatrix.gguf")]
    set_string(path, key, value)
    fix_hashes(light)
    found = violations(light)
    assert any(named in one for one in found), found


@pytest.mark.parametrize(
    "key",
    [
        "general.file_type",
        "reap2gguf.source_expert_count",
        "quantize.imatrix.chunks_count",
        "quantize.imatrix.entries_count",
    ],
)
def test_a_changed_number_in_a_header_disagrees(key: str, light: Bundle) -> None:
    set_number(light.gguf / "example-IQ4_K_M.gguf", key, 7)
    fix_hashes(light)
    assert any(f"{key} is 7, expected" in one for one in violations(light))


def test_bytes_after_the_last_tensor(light: Bundle) -> None:
    rewrite(light.gguf / "example-BF16.gguf", lambda raw: raw + bytes(64))
    fix_hashes(light)
    found = violations(light)
    assert any("bytes after its last tensor" in one for one in found), found
    assert any("n_bytes is 22734912" in one for one in found), found


# the importance matrix


def scaled(entry: ImatrixEntry) -> ImatrixEntry:
    return ImatrixEntry(entry.name, entry.sums, entry.counts * 2)


def change_imatrix(bundle: Bundle, change: Callable[[Imatrix], Imatrix], both: bool) -> None:
    path = bundle.gguf / "imatrix.gguf"
    changed = change(load_imatrix(path))
    path.unlink()
    if both:
        path.with_suffix(".dat").unlink()
        save_both(changed, path)
    else:
        save_gguf(changed, path)
    fix_hashes(bundle)


def with_entries(change: Callable[[dict[str, ImatrixEntry]], object]) -> Callable[..., Imatrix]:
    def changed(imatrix: Imatrix) -> Imatrix:
        entries = dict(imatrix.entries)
        change(entries)
        return Imatrix(entries, imatrix.dataset, imatrix.n_chunks, imatrix.chunk_size)

    return changed


ATTENTION, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"


def lose(entries: dict[str, ImatrixEntry]) -> None:
    del entries[ATTENTION]


def invent(entries: dict[str, ImatrixEntry]) -> None:
    entries["blk.9.attn_q.weight"] = entries[ATTENTION]


def of_the_embedding(entries: dict[str, ImatrixEntry]) -> None:
    entries["token_embd.weight"] = entries[ATTENTION]


def count_twice(entries: dict[str, ImatrixEntry]) -> None:
    entries[DOWN] = scaled(entries[DOWN])


def of_sixteen(entries: dict[str, ImatrixEntry]) -> None:
    entry = entries[DOWN]
    sums, counts = (np.concatenate((a, a[:4])) for a in (entry.sums, entry.counts))
    entries[DOWN] = ImatrixEntry(DOWN, sums, counts)


def of_the_other_width(entries: dict[str, ImatrixEntry]) -> None:
    entry = entries[ATTENTION]
    entries[ATTENTION] = ImatrixEntry(ATTENTION, entry.sums[:, :-1], entry.counts)


IMATRIX = [
    (lose, f"has no entry for {ATTENTION}"),
    (invent, "'blk.9.attn_q.weight' is not a matrix of the model"),
    (of_the_embedding, "'token_embd.weight', which the model does not multiply"),
    (count_twice, f"{DOWN} counts 61,440 tokens"),
    (count_twice, "its experts saw other numbers of tokens than imatrix_coverage in"),
    (of_sixteen, "has sums of shape [16, 256], expected [12, 256]"),
    (of_the_other_width, "has sums of shape [1, 255], expected [1, 256]"),
]


@pytest.mark.parametrize(("change", "named"), IMATRIX, ids=[words for _, words in IMATRIX])
def test_a_changed_imatrix_disagrees(
    change: Callable[[dict[str, ImatrixEntry]], None], named: str, light: Bundle
) -> None:
    change_imatrix(light, with_entries(change), both=True)
    found = violations(light)
    assert any(named in one for one in found), found


def test_both_files_hold_one_matrix(light: Bundle) -> None:
    def scale(imatrix: Imatrix) -> Imatrix:
        entries = {
            name: ImatrixEntry(name, entry.sums * 2, entry.counts)
            for name, entry in imatrix.entries.items()
        }
        return Imatrix(entries, imatrix.dataset, imatrix.n_chunks, imatrix.chunk_size)

    change_imatrix(light, scale, both=False)
    assert "imatrix.dat: does not hold the values of imatrix.gguf" in violations(light)


@pytest.mark.parametrize("raw", [b"GGUF", b"", bytes(5000)], ids=["magic", "empty", "zeros"])
def test_an_imatrix_that_is_none(raw: bytes, light: Bundle) -> None:
    rewrite(light.gguf / "imatrix.gguf", lambda _: raw)
    fix_hashes(light)
    assert any("imatrix" in one for one in violations(light))


def test_an_imatrix_of_nan(light: Bundle) -> None:
    path = own(light.gguf / "imatrix.gguf")
    header = read_gguf_header(path)
    info = header.tensors[f"{ATTENTION}.in_sum2"]
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(np.full(4, np.nan, "<f4").tobytes())
    fix_hashes(light)
    assert any("holds NaN, infinite or negative sums" in one for one in violations(light))


@pytest.mark.parametrize("change", [lambda raw: b"no", lambda raw: raw + b"x"])
def test_a_dat_that_is_another(change: Callable[[bytes], bytes], light: Bundle) -> None:
    rewrite(light.gguf / "imatrix.dat", change)
    fix_hashes(light)
    assert any(one.startswith("imatrix.dat: ") for one in violations(light))


@pytest.mark.parametrize(
    "name", ["imatrix.gguf", "imatrix.dat", "calibration.txt", "Modelfile", "README.md"]
)
def test_a_file_that_every_bundle_has(name: str, light: Bundle) -> None:
    (light.gguf / name).unlink()
    fix_hashes(light)
    found = violations(light)
    assert f"example-GGUF: {name} is missing" in found
    assert f"example-GGUF: {name} is not in SHA256SUMS" in found


# generated texts

TEXTS = [
    ("example-GGUF/Modelfile", b"FROM ./example", b"FROM ./another", "line 2 is 'FROM ./another"),
    ("example-GGUF/Modelfile", b"PARAMETER", b"SYSTEM Be rude.\nPARAMETER", "line 6 is 'SYSTEM"),
    ("example-GGUF/README.md", b"12 of 16", b"15 of 16", "15 of 16"),
    ("example/README.md", b"12 of 16", b"15 of 16", "15 of 16"),
    ("example/README.md", b"- reap\n", b"- magic\n", "'- magic', expected '- reap'"),
    ("example-GGUF/README.md", b"apache-2.0", b"mit", "'license: mit', expected"),
    ("example-GGUF/calibration.txt", b"the", b"THE", "calibration.txt is not the text"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "named"), TEXTS, ids=[n for *_, n in TEXTS])
def test_a_changed_text_is_not_what_the_manifest_gives(
    file: str, old: bytes, new: bytes, named: str, light: Bundle
) -> None:
    path = light.output / file
    assert old in path.read_bytes()
    rewrite(path, lambda raw: raw.replace(old, new))
    fix_hashes(light)
    found = violations(light)
    assert any(named in one for one in found), found


def save_observations(bundle: Bundle, **changes: Any) -> None:
    path = bundle.gguf / OBSERVATIONS_FILE
    changed = replace(Observations.load(path), **changes)
    path.unlink()
    changed.save(path)
    fix_hashes(bundle)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_tokens": 5}, "n_tokens is 5, expected"),
        ({"n_rows": 1}, "n_rows is 1, expected"),
        ({"model_fingerprint": "0" * 64}, "are of another checkpoint than the manifest's source"),
        ({"layers": {}}, "layer 0 does not have 16 experts"),
    ],
)
def test_observations_of_something_else(changes: dict[str, Any], named: str, light: Bundle) -> None:
    save_observations(light)
    assert violations(light) == ()
    save_observations(light, **changes)
    found = violations(light)
    assert any(named in one for one in found), found


def test_observations_that_are_none(light: Bundle) -> None:
    rewrite(light.gguf / OBSERVATIONS_FILE, lambda raw: b"x" * 100)
    fix_hashes(light)
    assert any(OBSERVATIONS_FILE in one for one in violations(light))


def test_a_bundle_from_before_there_were_pictures(light: Bundle) -> None:
    """Its cards are another version's, and so are not compared."""

    def forget(values: Values) -> None:
        for name in ("pictures", "has_observations", "evaluation"):
            del values[name]
        for name in ("saliency.png", "usage.png"):
            del values["hf"]["files"][name]
        values["written_by"] = "0.0.9"

    for folder in (light.hf, light.gguf):
        for picture in folder.glob("*.png"):
            picture.unlink()
    (light.gguf / OBSERVATIONS_FILE).unlink()
    change_manifest(light, forget)
    assert violations(light) == ()


def test_a_modelfile_alone_is_compared_by_its_instructions(light: Bundle, tmp_path: Path) -> None:
    light.hf.rename(tmp_path / "away")
    assert violations(light) == ()
    rewrite(light.gguf / "Modelfile", lambda raw: raw + b"ADAPTER ./lora.gguf\n")
    (light.gguf / "SHA256SUMS").unlink()
    write_sums(light.gguf, 1)
    (found,) = violations(light)
    assert found.endswith("line 2 is 'ADAPTER ./lora.gguf', expected missing")


def test_texts_of_another_version_are_not_compared(light: Bundle) -> None:
    change_manifest(light, put("program", "reap2gguf", value="0.0.9"))
    report = verify_bundle(light.gguf, 1, Silent())
    assert any("made by reap2gguf 0.0.9" in one for one in report.not_checked)
    assert not any("README.md" in one for one in report.violations)
    assert any("reap2gguf.version" in one for one in report.violations)
