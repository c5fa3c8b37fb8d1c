"""Files that are no part of a bundle: named by verify and by push, in either folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from reap2gguf.bundle.opening import open_bundle
from reap2gguf.errors import VerificationError
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import check_bundle, verify_bundle
from reap2gguf.verifying.context import Strictness
from tests.conftest import Bundle
from tests.verifying.mutations import copied, fix_hashes

HEADERS_ONLY = Strictness(reads_values=False)


@pytest.fixture
def light(built: Bundle, tmp_path: Path) -> Bundle:
    return copied(built, tmp_path / "build")


def refused_by_both(bundle: Bundle) -> tuple[str, ...]:
    """The violations of verify, which are those of push."""
    found = verify_bundle(bundle.gguf, 1, Silent(), HEADERS_ONLY).violations
    with pytest.raises(VerificationError, match="nothing was uploaded") as caught:
        check_bundle(open_bundle(bundle.gguf), 1, Silent())
    assert tuple(caught.value.violations) == found
    return found


STRAYS = [
    "modeling_evil.py", "pytorch_model.bin", "other.gguf", "consolidated.safetensors", "notes.txt",
    "model-00003-of-00002.safetensors", ".hidden", "weights.PT", "tokenizer.json.bak",
    "config.json.part", "optimizer.pt", "LICENSE.py", "chat_template.jinja.gguf",
]  # fmt: skip


@pytest.mark.parametrize("place", ["hf", "gguf"])
@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_is_named(name: str, place: str, light: Bundle) -> None:
    """Also if its hash is in the records."""
    folder: Path = getattr(light, place)
    (folder / name).write_bytes(b"stray")
    fix_hashes(light)
    found = refused_by_both(light)
    assert any(name in one for one in found), found


def test_a_gguf_file_of_the_user_is_told_how_to_be_added(light: Bundle) -> None:
    (light.gguf / "example-Q8_0.gguf").write_bytes(b"mine")
    (found,) = refused_by_both(light)
    assert found == (
        "example-GGUF: example-Q8_0.gguf is not part of the bundle; move it away, or take it "
        "over with `reap2gguf add BUNDLE FILE.gguf`"
    )


@pytest.mark.parametrize("place", ["hf", "gguf"])
def test_a_subfolder_is_named(place: str, light: Bundle) -> None:
    folder: Path = getattr(light, place)
    (folder / "extra").mkdir()
    (folder / "extra" / "evil.py").write_text("")
    (found,) = refused_by_both(light)
    assert found == f"{folder.name}: extra is not part of the bundle; move it away"


def test_what_a_download_leaves_is_no_stray(light: Bundle) -> None:
    (light.gguf / ".cache" / "huggingface").mkdir(parents=True)
    (light.hf / ".git").mkdir()
    (light.hf / ".gitattributes").write_text("")
    assert verify_bundle(light.gguf, 1, Silent(), HEADERS_ONLY).violations == ()
    check_bundle(open_bundle(light.gguf), 1, Silent())


def link_out(path: Path, outside: Path) -> None:
    path.rename(outside)
    path.symlink_to(outside)


def link_beside(path: Path, outside: Path) -> None:
    other = path.with_name("elsewhere")
    path.rename(other)
    path.symlink_to(other.name)


def link_to_nothing(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside)


def pipe(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [link_out, link_beside, link_to_nothing, pipe, folder])
@pytest.mark.parametrize(
    "file",
    ["example/tokenizer.json", "example-GGUF/example-BF16.gguf", "example-GGUF/Modelfile"],
)
def test_a_link_is_refused_and_not_followed(
    file: str, change: Callable[[Path, Path], None], light: Bundle, tmp_path: Path
) -> None:
    path = light.output / file
    change(path, tmp_path / "outside")
    found = refused_by_both(light)
    kinds = {"pipe": "a pipe", "folder": "a folder"}
    expected = f"{path.parent.name}: {path.name} is {kinds.get(change.__name__, 'a link')}, "
    assert any(one.startswith(expected) for one in found), found


@pytest.mark.parametrize("name", ["SHA256SUMS", "reap2gguf.json", "model.safetensors"])
def test_a_record_or_a_shard_behind_a_link(name: str, light: Bundle, tmp_path: Path) -> None:
    place = light.hf if name == "model.safetensors" else light.gguf
    link_out(place / name, tmp_path / "outside")
    found = verify_bundle(light.gguf, 1, Silent(), HEADERS_ONLY).violations
    if name == "reap2gguf.json":  # nothing is known without it
        assert "reap2gguf.json: cannot be read (a link, which is not followed" in found[0]
    else:
        assert f"{place.name}: {name} is a link, expected a file of the folder itself" in found


def test_a_bundle_in_the_cache_of_the_hub_is_sound(built: Bundle, tmp_path: Path) -> None:
    """Every file there is a link to its blob."""
    repository = tmp_path / "models--me--example-GGUF"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(built.gguf.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.hardlink_to(file)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    assert verify_bundle(snapshot, 1, Silent(), HEADERS_ONLY).violations == ()


def test_the_other_folder_behind_a_link(light: Bundle, tmp_path: Path) -> None:
    light.hf.rename(tmp_path / "elsewhere")
    light.hf.symlink_to(tmp_path / "elsewhere")
    found = verify_bundle(light.gguf, 1, Silent(), HEADERS_ONLY).violations
    assert "example: is a link, expected the folder beside example-GGUF" in found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda lines: [f"{'0' * 64}{lines[0][64:]}", *lines], "line 2 names Modelfile again"),
        (lambda lines: [*lines, lines[0]], "names Modelfile again"),
        (lambda lines: lines[::-1], "is not in the order of names (10 more are wrong)"),
        (lambda lines: lines[1:], "Modelfile is not in SHA256SUMS"),
        (lambda lines: [*lines, f"{'0' * 64}  zzz"], "names zzz, which is no part of the bundle"),
        (lambda lines: [*lines, ""], "line 13 is not a hash and a name"),
        (lambda lines: [lines[0].upper(), *lines[1:]], "line 1 is not a hash and a name"),
        (lambda lines: [line.replace("  ", " *") for line in lines], "line 1 is not a hash"),
    ],
)
def test_sums_list_every_file_once(
    change: Callable[[list[str]], list[str]], named: str, light: Bundle
) -> None:
    path = light.gguf / "SHA256SUMS"
    lines = change(path.read_text().splitlines())
    path.unlink()
    path.write_text("".join(f"{line}\n" for line in lines))
    found = refused_by_both(light)
    assert any(named in one for one in found), found
