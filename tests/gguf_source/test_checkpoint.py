"""GGUF files in place of checkpoints: observed, opened, and what is known of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap2gguf
from reap2gguf.artifacts.observations import Observations
from reap2gguf.errors import ArtifactError, Reap2ggufError, SourceError, UnsupportedModelError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
from reap2gguf.gguf_source.file import model_name
from reap2gguf.gguf_source.folder import MadeFolder
from reap2gguf.hub.opened import OpenModel, open_model
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.tokenizer.identity import tokens_of_folder, tokens_of_header
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.exporting.files import export_files, export_weights, plain
from tests.gguf_source.files import exported, in_parts
from tests.loopback_hub.model import serving
from tests.loopback_hub.repository import COMMIT
from tests.models.layouts import FIRST, Case
from tests.test_cli import run
from tests.tiny import EXAMPLE, TinyQwen3Moe, TinyQwen35Moe

TEXT = "The river rose in the night, and by the morning the old bridge was gone. " * 40
CPU = ComputeOptions(device="cpu", threads=1, dtype="float32")
TINY = TinyQwen3Moe(n_layers=3, vocab=320)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example in files of several types, and a text."""
    made = tmp_path_factory.mktemp("example")
    export_files(EXAMPLE, made, [plain("BF16"), plain("Q8_0"), plain("Q4_K_M")])
    (made / "text.txt").write_text(TEXT)
    return made


def observed(model: Path | str, text: Path, output: Path) -> Observations:
    calibration = CalibrationOptions(str(text), samples=8, max_length=64)
    return reap2gguf.observe(model, output, calibration=calibration, compute=CPU)


@pytest.fixture(scope="module")
def of_folder(example: Path) -> Observations:
    return observed(EXAMPLE, example / "text.txt", example / "folder.safetensors")


def test_a_file_without_loss_is_observed_as_its_checkpoint(
    example: Path, of_folder: Observations
) -> None:
    """From the tokenizer in its header and from its blocks: the same tokens, the same sums."""
    found = observed(example / "BF16.gguf", example / "text.txt", example / "bf16.safetensors")
    assert found.calibration_sha256 == of_folder.calibration_sha256
    assert found.layers.keys() == of_folder.layers.keys()
    for layer, seen in found.layers.items():
        for name in ("count", "reap_sum", "norm_max"):
            np.testing.assert_array_equal(
                getattr(seen, name), getattr(of_folder.layers[layer], name)
            )
    assert found.model_fingerprint != of_folder.model_fingerprint
    assert found.architecture == of_folder.architecture == "qwen3moe"
    assert found.tokens_sha256 == of_folder.tokens_sha256 != ""


def test_eight_bits_keep_the_experts_of_the_original(
    example: Path, of_folder: Observations
) -> None:
    seen = observed(example / "Q8_0.gguf", example / "text.txt", example / "q8.safetensors")
    found = reap2gguf.select(example / "Q8_0.gguf", seen, keep_experts=12)
    expected = reap2gguf.select(EXAMPLE, of_folder, keep_experts=12)
    assert found.kept == expected.kept


def test_observations_of_the_original_choose(example: Path, tmp_path: Path) -> None:
    source, seen = example / "Q4_K_M.gguf", example / "folder.safetensors"
    result = run(
        "prune", source, "--observations", seen, "--compression", "0.5", "-o", tmp_path / "x.gguf"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = reap2gguf.select(EXAMPLE, seen, compression=0.5)
    assert not reap2gguf.verify(tmp_path / "x.gguf", source=source).violations
    with open_model(str(tmp_path / "x.gguf"), Silent()) as opened:
        keys = opened.checkpoint.gguf
        assert keys is not None
        flat = [one for layer in sorted(expected.kept) for one in expected.kept[layer]]
        assert keys.metadata["reap2gguf.kept_experts"] == flat


def _other_layers(seen: Observations) -> Observations:
    return replace(seen, layers={n + 1: one for n, one in seen.layers.items()})


def _fewer_layers(seen: Observations) -> Observations:
    return replace(seen, layers=dict(list(seen.layers.items())[1:]))


def _fewer_experts(seen: Observations) -> Observations:
    arrays = {name: value[:8] for name, value in vars(seen.layers[0]).items()}
    return replace(seen, layers={**seen.layers, 0: type(seen.layers[0])(**arrays)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_other_layers, "are of the layers"),
        (_fewer_layers, "are of the layers"),
        (_fewer_experts, "layer 0 of the observations has 8 experts"),
        (lambda seen: replace(seen, architecture="olmoe"), "are of the architecture 'olmoe'"),
        (lambda seen: replace(seen, tokens_sha256="0" * 64), "of a model with other tokens"),
    ],
)
def test_observations_of_another_model(
    example: Path, of_folder: Observations, change: Any, problem: str
) -> None:
    with pytest.raises(ArtifactError, match=problem):
        reap2gguf.select(example / "Q8_0.gguf", change(of_folder), keep_experts=12)


def test_observations_that_do_not_say_of_what(example: Path, of_folder: Observations) -> None:
    """Those of earlier versions are compared by layers and experts alone."""
    old = replace(of_folder, architecture="", tokens_sha256="")
    old.save(example / "old.safetensors")
    read = Observations.load(example / "old.safetensors")
    assert (read.architecture, read.tokens_sha256) == ("", "")
    expected = reap2gguf.select(EXAMPLE, of_folder, keep_experts=12)
    assert reap2gguf.select(example / "Q8_0.gguf", read, keep_experts=12).kept == expected.kept


def opened(path: Path | str) -> OpenModel:
    return open_model(str(path), Silent())


def test_what_is_known_of_a_file(example: Path) -> None:
    with opened(example / "Q4_K_M.gguf") as found:
        checkpoint = found.checkpoint
        assert isinstance(checkpoint, GgufCheckpoint)
        assert found.source.label == found.source.short_name == "Q4_K_M"
        kinds = {checkpoint.kind(name) for name in checkpoint.tensors}
        assert kinds == {"F32", "Q4_K", "Q6_K"}
        assert {one.dtype for one in checkpoint.tensors.values()} == {"F32"}
        assert checkpoint.n_file_bytes == (example / "Q4_K_M.gguf").stat().st_size
        assert checkpoint.n_bytes < checkpoint.n_file_bytes
        assert "bits per weight" in checkpoint.caveats[0]
        before = checkpoint.fingerprint()
    with opened(example / "BF16.gguf") as other:
        assert other.checkpoint.caveats == ()
        assert other.checkpoint.fingerprint() != before


def test_a_fingerprint_sees_every_tensor(tmp_path: Path) -> None:
    path = exported(TINY, tmp_path, "Q8_0")
    with opened(path) as found:
        before, header = found.checkpoint.fingerprint(), found.checkpoint.gguf
    assert header is not None
    info = header.tensors["blk.2.ffn_down_exps.weight"]
    with open(path, "r+b") as file:
        file.seek(info.offset + info.n_bytes // 2)
        file.write(b"\x55")
    with opened(path) as found:
        assert found.checkpoint.fingerprint() != before


def test_the_made_folder_goes(example: Path) -> None:
    found = opened(example / "Q8_0.gguf")
    found.check_tokenizer()
    folder = found.source.folder
    assert folder.name == "Q8_0.gguf"
    assert json.loads((folder / "config.json").read_text())["num_experts"] == 16
    expected = Tokenizer(EXAMPLE).encode(TEXT)
    np.testing.assert_array_equal(Tokenizer(folder).encode(TEXT), expected)
    template = (EXAMPLE / "chat_template.jinja").read_text()
    assert (folder / "chat_template.jinja").read_text().strip() == template.strip()
    del found
    assert not folder.parent.exists()


def test_a_tokenizer_that_is_not_known(tmp_path: Path) -> None:
    """It is refused where text is read, and not where none is."""
    path = exported(TINY, tmp_path, "Q8_0")
    raw = path.read_bytes()
    assert raw.count(b"qwen2") == 1
    path.write_bytes(raw.replace(b"qwen2", b"other"))
    with opened(path) as found, pytest.raises(UnsupportedModelError, match="pass the safetensors"):
        found.check_tokenizer()
    output = tmp_path / "out.gguf"
    reap2gguf.prune(path, None, output, method="aimer", keep_experts=6)
    assert b"other" in output.read_bytes()


@pytest.mark.parametrize("tiny", [TINY, TinyQwen35Moe()], ids=["3", "3.5"])
def test_tokens_of_a_file_are_those_of_its_checkpoint(tiny: Any, tmp_path: Path) -> None:
    with opened(exported(tiny, tmp_path, "F16")) as found, opened(tmp_path / "model") as folder:
        header, model = found.checkpoint.gguf, folder.model
        assert header is not None
        expected = tokens_of_folder(tmp_path / "model", model.facts.vocab_size, model.tokenizers)
        assert tokens_of_header(header) == expected
        renamed = dict(header.metadata)
        renamed["tokenizer.ggml.tokens"] = ["x", *renamed["tokenizer.ggml.tokens"][1:]]
        assert tokens_of_header(replace(header, metadata=renamed)) != expected
        del renamed["tokenizer.ggml.token_type"]
        assert tokens_of_header(replace(header, metadata=renamed)) == ""


def test_a_folder_is_made_for_each(tmp_path: Path) -> None:
    header = opened(exported(TINY, tmp_path, "F16")).checkpoint.gguf
    assert header is not None
    one, other = (MadeFolder(header, {"a": 1}, "x.gguf") for _ in range(2))
    assert one.path != other.path
    one.make_tokenizer()
    before = (one.path / "tokenizer.json").stat().st_mtime_ns
    one.make_tokenizer()
    assert (one.path / "tokenizer.json").stat().st_mtime_ns == before
    assert not (other.path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Qwen3-30B-A3B"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL-00001-of-00002.gguf", "Qwen3-30B-A3B"),
        ("model.bf16.GGUF", "model"),
        ("Q4_K_M.gguf", "Q4_K_M"),
        ("a-REAP-0.25.gguf", "a-REAP-0.25"),
    ],
)
def test_names_of_models(file: str, expected: str) -> None:
    assert model_name(file) == expected


def test_a_later_part(tmp_path: Path) -> None:
    parts = in_parts(exported(TINY, tmp_path, "Q8_0"), tmp_path / "parts", 120_000)
    with pytest.raises(ArtifactError, match="pass the first"):
        opened(parts[1])
    (tmp_path / "parts" / parts[2].name).unlink()
    with pytest.raises(ArtifactError, match="00003"):
        opened(parts[0])


def test_a_file_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Observed and pruned by ranges: the same as of the file here."""
    path = exported(TINY, tmp_path, "Q8_0").rename(tmp_path / "tiny-Q8_0.gguf")
    parts = in_parts(path, tmp_path / "parts", 120_000)
    files = {f"parts/{one.name}": one.read_bytes() for one in parts}
    kept = {layer: (0, 2, 3, 7) for layer in range(3)}
    expected = reap2gguf.prune(path, None, tmp_path / "here.gguf", kept=kept).folder
    (tmp_path / "text.txt").write_text(TEXT)
    here = observed(path, tmp_path / "text.txt", tmp_path / "here.safetensors")
    with serving({"tiny-Q8_0.gguf": path.read_bytes(), **files}, monkeypatch, tmp_path / "cache"):
        with opened("owner/name:tiny-Q8_0.gguf") as found:
            source = found.source
            assert (source.label, source.revision) == ("owner/name", COMMIT)
            assert source.short_name == "tiny"
            assert found.checkpoint.stamps()[0][0] == "name:tiny-Q8_0.gguf"
        monkeypatch.chdir(tmp_path)
        output = tmp_path / "x.safetensors"
        there = observed("owner/name:tiny-Q8_0.gguf", tmp_path / "text.txt", output)
        written = reap2gguf.prune(
            f"owner/name:parts/{parts[0].name}", None, tmp_path / "there.gguf", kept=kept
        ).folder
        with pytest.raises(SourceError, match="no file 'Q2_K'"):
            opened("owner/name:Q2_K")
    for layer, seen in there.layers.items():
        np.testing.assert_array_equal(seen.reap_sum, here.layers[layer].reap_sum)
    with opened(written) as ours, opened(expected) as theirs:
        one, other = ours.checkpoint.gguf, theirs.checkpoint.gguf
        assert one is not None
        assert other is not None
        assert len(one.headers) == len(parts)
        for name in other.tensors:
            np.testing.assert_array_equal(one.read(name), other.read(name))
        assert one.metadata["reap2gguf.source"] == f"owner/name:{parts[0].name}"


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    result = run("prune", tmp_path / "x.gguf", "--method", "aimer", "-o", tmp_path / "y.gguf")
    assert result.exit_code == 2
    assert "x.gguf: begins with" in result.output


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_architecture_is_read(case: Case, tmp_path: Path) -> None:
    """Exported again from what was read: the same keys, and the same values but for last bits."""
    source = exported(case.tiny, tmp_path, "F32")
    (tmp_path / "again").mkdir()
    with opened(source) as found:
        again = export_weights(found.checkpoint, found.model, tmp_path / "again", [plain("F32")])[
            "F32"
        ]
    before, after = (read_gguf_header(path) for path in (source, again))
    assert after.metadata == before.metadata
    assert after.tensors.keys() == before.tensors.keys()
    for name in before.tensors:
        one, other = (header.read(name).view(np.float32) for header in (before, after))
        np.testing.assert_allclose(other, one, rtol=2e-6, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("kind", ["quantize", "observe", "aimer"])
def test_values_that_are_not_finite_are_named_as_in_the_file(tmp_path: Path, kind: str) -> None:
    """By the user's file and by GGUF's name of the tensor, and by no private folder."""
    path = exported(TINY, tmp_path, "F16")
    info = read_gguf_header(path).tensors["blk.1.ffn_up_exps.weight"]
    with open(path, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\x00\x7e" * (info.row_bytes // 2))
    text = tmp_path / "text.txt"
    text.write_text("Each line says a little more than that.\n" * 40)
    compute = ComputeOptions(device="cpu", threads=1)
    calibration = CalibrationOptions(str(text))
    output = tmp_path / "out.gguf"
    runs: dict[str, Any] = {
        "quantize": lambda: reap2gguf.quantize(path, "Q8_0", output),
        "observe": lambda: reap2gguf.observe(
            path, output, calibration=calibration, compute=compute
        ),
        "aimer": lambda: reap2gguf.prune(path, None, output, method="aimer", keep_experts=6),
    }
    with pytest.raises(Reap2ggufError) as caught:
        runs[kind]()
    message = str(caught.value)
    assert str(path) in message
    assert "reap2gguf-work" not in message
    if kind != "aimer":
        assert "'blk.1.ffn_up_exps.weight' (model.layers.1." in message


def test_a_config_that_cannot_be_is_named_by_the_file(tmp_path: Path) -> None:
    path = exported(TINY, tmp_path, "F16")
    raw = path.read_bytes()
    key = b"qwen3moe.expert_used_count"
    at = raw.index(key) + len(key) + 4
    path.write_bytes(raw[:at] + (10**6).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(Reap2ggufError) as caught:
        reap2gguf.select(path, method="aimer", keep_experts=6)
    assert path.name in str(caught.value)
    assert "reap2gguf-work" not in str(caught.value)
