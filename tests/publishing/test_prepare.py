"""What two repositories are to hold, made from a bundle."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from reap2gguf.atomic import write_whole
from reap2gguf.bundle.card import CardNames
from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.opening import OpenBundle, open_bundle
from reap2gguf.bundle.sums import write_sums
from reap2gguf.errors import UsageError, VerificationError
from reap2gguf.progress import Silent
from reap2gguf.publishing import prepare as prepare_module
from reap2gguf.publishing.contents import PreparedFile, PreparedPush, PreparedRepo
from reap2gguf.publishing.prepare import prepare
from tests.conftest import Bundle

NAMES = CardNames("me/thing", "me/thing-GGUF", on_hub=True)


def content(file: PreparedFile) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def texts(repo: PreparedRepo) -> dict[str, str]:
    return {f.name: content(f).decode() for f in repo.files if isinstance(f.content, bytes)}


@pytest.fixture(scope="module")
def folders(built: Bundle) -> OpenBundle:
    return open_bundle(built.gguf)


@pytest.fixture(scope="module")
def prepared(folders: OpenBundle, tmp_path_factory: pytest.TempPathFactory) -> PreparedPush:
    return prepare(folders, NAMES, 10_000_000, tmp_path_factory.mktemp("push"), Silent())


def test_every_hash_and_size_is_of_what_will_be_sent(prepared: PreparedPush) -> None:
    for repo in prepared.repos:
        for file in repo.files:
            raw = content(file)
            assert (file.n_bytes, file.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_only_what_names_a_place_is_changed(prepared: PreparedPush, folders: OpenBundle) -> None:
    assert texts(prepared.hf).keys() == {"README.md", MANIFEST_FILE}
    assert texts(prepared.gguf).keys() == {"README.md", MANIFEST_FILE, "SHA256SUMS", "Modelfile"}
    joining = "llama-gguf-split --merge example-BF16-00001-of-00003.gguf example-BF16.gguf"
    own = (folders.gguf / "Modelfile").read_text()
    assert texts(prepared.gguf)["Modelfile"] == f"# Ollama cannot read parts: {joining}\n{own}"
    names = {file.name for file in prepared.hf.files}
    assert names == {file.name for file in folders.hf.iterdir()}
    names = {file.name for file in prepared.gguf.files}
    whole = {file.name for file in folders.gguf.iterdir()} - {"example-BF16.gguf"}
    assert names - whole == {f"example-BF16-0000{n}-of-00003.gguf" for n in (1, 2, 3)}


def test_the_cards_name_the_repositories(prepared: PreparedPush, folders: OpenBundle) -> None:
    cards = [texts(repo)["README.md"] for repo in prepared.repos]
    for card, folder in zip(cards, (folders.hf, folders.gguf), strict=True):
        local = (folder / "README.md").read_text()
        expected = ModelCard(local).data.to_dict()
        if folder == folders.gguf:
            assert "base_model" not in expected, "the source is a folder of this machine"
            expected |= {"base_model": "me/thing", "base_model_relation": "quantized"}
            expected["quantized_by"] = "me"
        assert ModelCard(card).data.to_dict() == expected
        links = set(re.findall(r"https://huggingface.co/(me/[\w-]+)", card))
        others = {"me/thing"} if folder == folders.gguf else set()  # LM Studio takes a link
        assert links == {"me/thing-GGUF", *others}
    assert cards[0].count('from_pretrained("me/thing"') == 2
    assert "vllm serve me/thing\n" in cards[0]
    assert "hf download me/thing-GGUF example-IQ4_K_M.gguf Modelfile --local-dir ." in cards[1]
    assert re.search(r"`example-BF16-00001-of-00003.gguf` \| 21\.\d\d MiB in 3 parts \|", cards[1])
    joined = "--merge example-BF16-00001-of-00003.gguf example-BF16.gguf`"
    assert f"`llama-gguf-split {joined}" in cards[1]
    assert "`example" not in cards[0]


def test_the_manifest_is_of_what_will_be_there(prepared: PreparedPush, tmp_path: Path) -> None:
    one, other = (texts(repo)[MANIFEST_FILE] for repo in prepared.repos)
    assert one == other
    write_whole(tmp_path / MANIFEST_FILE, one)
    found = Manifest.load(tmp_path)
    assert found.hf.folder == "thing"
    assert found.gguf[1].parts == tuple(f"example-BF16-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    assert found.gguf[0].first == "example-IQ4_K_M.gguf"
    hashes = {file.name: file.sha256 for file in prepared.hf.files if file.name != MANIFEST_FILE}
    assert {name: record.sha256 for name, record in found.hf.files.items()} == hashes
    sums = dict(
        reversed(line.split("  ")) for line in texts(prepared.gguf)["SHA256SUMS"].splitlines()
    )
    assert sums == {f.name: f.sha256 for f in prepared.gguf.files if f.name != "SHA256SUMS"}


def test_a_modelfile_says_once_how_to_join(bundle: Bundle, tmp_path: Path) -> None:
    """As in a download that is published again."""
    said = "# Ollama cannot read parts: llama-gguf-split --merge example-BF16-00001-of-00003.gguf "
    (bundle.gguf / "Modelfile").write_text(f"{said}example-BF16.gguf\nFROM ./mine.gguf\n")
    write_sums(bundle.gguf, 1)
    found = prepare(open_bundle(bundle.hf), NAMES, 10_000_000, tmp_path / "push", Silent())
    (prepared,) = (file for file in found.gguf.files if file.name == "Modelfile")
    assert prepared.content == bundle.gguf / "Modelfile"


def test_a_dry_run_knows_every_size(prepared: PreparedPush, folders: OpenBundle) -> None:
    foreseen = prepare(folders, NAMES, 10_000_000, None, Silent())
    for one, other in zip(foreseen.repos, prepared.repos, strict=True):
        assert [(f.name, f.n_bytes) for f in one.files] == [
            (f.name, f.n_bytes) for f in other.files
        ]


def test_parts_of_another_bundle_are_not_taken(folders: OpenBundle, tmp_path: Path) -> None:
    prepare(folders, NAMES, 10_000_000, tmp_path, Silent())
    (first,) = tmp_path.iterdir()
    prepare(folders, NAMES, 12_000_000, tmp_path, Silent())
    (second,) = tmp_path.iterdir()
    assert first != second
    part = second / "example-BF16-00001-of-00002.gguf"
    part.write_bytes(bytes(part.stat().st_size))  # as another disk might
    with pytest.raises(VerificationError, match="nothing was uploaded") as caught:
        prepare(folders, NAMES, 12_000_000, tmp_path, Silent())
    whole = folders.gguf / "example-BF16.gguf"
    assert caught.value.violations == [f"{part}: does not hold the bytes of {whole}"]
    prepare(folders, NAMES, 12_000_000, tmp_path, Silent())


def test_a_file_that_cannot_be_cut(folders: OpenBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "HUB_MAX_BYTES", 20_000_000)
    with pytest.raises(UsageError, match=r"model\.safetensors: has .* only a model's GGUF file"):
        prepare(folders, NAMES, 10_000_000, None, Silent())


def test_a_card_that_the_hub_refuses(bundle: Bundle) -> None:
    card = bundle.hf / "README.md"
    card.write_text("---\nlicense: [mit\n---\n\n# Model\n")
    with pytest.raises(VerificationError) as caught:
        prepare(open_bundle(bundle.hf), NAMES, 10**10, None, Silent())
    assert "front matter that the Hub refuses" in caught.value.violations[0]


def test_preparing_does_not_change_the_bundle(prepared: PreparedPush, folders: OpenBundle) -> None:
    assert Manifest.load(folders.gguf) == folders.manifest
    assert replace(prepared.hf.manifest, hf=folders.manifest.hf, gguf=folders.manifest.gguf) == (
        folders.manifest
    )
