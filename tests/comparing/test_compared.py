"""Files of several makers side by side: what they are made of, and how good they are."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType

import reap2gguf
from reap2gguf.bundle.evaluation import evaluation_of
from reap2gguf.comparing.contents import Contents, contents_of_gguf
from reap2gguf.comparing.opening import open_all
from reap2gguf.comparing.picture import points_of
from reap2gguf.errors import SourceError, UsageError
from reap2gguf.evaluating import scoring
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.split import plan_split, write_part
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.terminal.compare_views import comparison_lines
from tests.exporting.files import export_files, llama_quantize, plain
from tests.local.altered import altered
from tests.loopback_hub.model import serving
from tests.models.oracles import pruned
from tests.test_cli import run
from tests.tiny import EXAMPLE, TinyQwen3Moe, TinyQwen35Moe

TEXT = "The river rose in the night, and by the morning the old bridge was gone. " * 40
CPU = ComputeOptions(device="cpu", threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in two files of this program and one of llama.cpp, and a text."""
    made = tmp_path_factory.mktemp("files")
    ours = export_files(EXAMPLE, made, [plain("BF16"), plain("Q4_K_M")])
    ours["Q4_K_M"].rename(made / "ours-Q4_K_M.gguf")
    kind = LlamaFileType.MOSTLY_Q3_K_M
    assert llama_quantize(ours["BF16"], made / "theirs-Q3_K_M.gguf", kind)
    (made / "text.txt").write_text(TEXT)
    return made


def compared(*models: Path | str, **more: object) -> reap2gguf.ModelComparison:
    options = {"chunk": 64, "chunks": 2, "compute": CPU, **more}
    return reap2gguf.compare(*models, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def three(files: Path) -> reap2gguf.ModelComparison:
    return compared(
        files / "ours-Q4_K_M.gguf",
        files / "theirs-Q3_K_M.gguf",
        reference=EXAMPLE,
        text=str(files / "text.txt"),
    )


def test_a_file_of_ours_beside_one_of_llama_cpp(three: reap2gguf.ModelComparison) -> None:
    assert [one.label for one in three.models] == [
        "tiny-qwen3-moe", "ours-Q4_K_M.gguf", "theirs-Q3_K_M.gguf",
    ]  # fmt: skip
    assert three.reference == "tiny-qwen3-moe"
    source, ours, theirs = three.models
    assert [one.contents.file_type for one in three.models] == ["BF16", "Q4_K_M", "Q3_K_M"]
    assert source.contents.bits_per_weight == 16
    assert theirs.contents.n_file_bytes < ours.contents.n_file_bytes
    near, far = (three.divergence(one.label) for one in (ours, theirs))
    assert near is not None
    assert far is not None
    assert 0 < near.mean.value < far.mean.value
    assert near.same_top.value > far.same_top.value > 0.5
    assert three.divergence(source.label) is None
    assert three.evaluation is not None
    assert three.evaluation.text is not None
    assert three.evaluation.text.n_scored == 62


def test_without_the_checkpoint_it_is_the_same(
    files: Path, three: reap2gguf.ModelComparison
) -> None:
    """Config, names and tokenizer come from the headers; the largest file is the reference."""
    found = compared(
        files / "theirs-Q3_K_M.gguf", files / "BF16.gguf", text=str(files / "text.txt")
    )
    assert found.reference == "BF16.gguf"
    before, now = (
        one.perplexity(label) for one, label in ((three, "tiny-qwen3-moe"), (found, "BF16.gguf"))
    )
    assert before is not None
    assert now is not None
    assert now.value == pytest.approx(before.value, rel=1e-6)
    first, second = (one.divergence("theirs-Q3_K_M.gguf") for one in (three, found))
    assert first is not None
    assert second is not None
    assert second.mean.value == pytest.approx(first.mean.value, rel=1e-4)


def test_json(three: reap2gguf.ModelComparison) -> None:
    values = json.loads(json.dumps(three.as_json()))
    assert three.evaluation is not None
    assert evaluation_of(values["evaluation"]).variants == three.evaluation.variants
    assert values["reference"] == "tiny-qwen3-moe"
    ours = values["models"][1]
    assert ours["experts"] == [16]
    assert ours["roles"]["experts down"]["types"].keys() == {"Q4_K", "Q6_K"}
    assert sum(one["bytes"] for one in ours["roles"].values()) == ours["bytes"]
    inside = sum(
        one["bytes"] for role, one in ours["roles"].items() if role not in ("embedding", "output")
    )
    norm = 4 * 128
    assert sum(one["bytes"] for one in ours["layers"]) == pytest.approx(inside, abs=norm * 4)


def test_what_a_file_holds(files: Path) -> None:
    path = files / "theirs-Q3_K_M.gguf"
    found = contents_of_gguf(read_gguf_header(path))
    theirs = GGUFReader(path).tensors
    assert found.total.n_bytes == sum(int(t.n_bytes) for t in theirs)
    assert found.total.n_weights == sum(int(t.n_elements) for t in theirs)
    down = [t for t in theirs if "ffn_down_exps" in t.name]
    assert found.roles["experts down"].n_bytes == sum(int(t.n_bytes) for t in down)
    layer = found.layer(1)
    assert layer is not None
    assert layer.n_bytes == sum(int(t.n_bytes) for t in theirs if t.name.startswith("blk.1."))
    assert found.layer(99) is None
    assert found.n_file_bytes == path.stat().st_size


def shapes_only(contents: Contents) -> dict[str, int]:
    return {role: portion.n_weights for role, portion in contents.roles.items()}


@pytest.mark.parametrize(
    "tiny",
    [TinyQwen3Moe(fused=True, dense_layers=(0,)), TinyQwen35Moe(vision=False), TinyQwen35Moe()],
    ids=["qwen3", "qwen3.5", "tower"],
)
def test_a_checkpoint_has_the_rows_of_its_file(
    tiny: TinyQwen3Moe | TinyQwen35Moe, tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path / "model")
    path = export_files(folder, tmp_path, [plain("BF16")])["BF16"]
    found = reap2gguf.compare(folder, path, quality=False)
    checkpoint, file = (one.contents for one in found.models)
    weights = shapes_only(checkpoint)
    assert (weights.pop("vision", 0) > 0) is getattr(tiny, "has_tower", False)
    assert weights == shapes_only(file)
    assert checkpoint.experts == file.experts == (8,)
    assert [*checkpoint.layers] == [*file.layers]
    if isinstance(tiny, TinyQwen35Moe):
        assert {"DeltaNet", "MTP", "shared expert"} <= weights.keys()


def test_pruned_beside_unpruned(tmp_path: Path) -> None:
    """Of both families, and a file with an MTP block beside one without."""
    for tiny in (TinyQwen3Moe(), TinyQwen35Moe()):
        folder = tmp_path / type(tiny).__name__
        folder.mkdir()
        source = tiny.write(folder / "source")
        smaller = pruned(source, folder / "smaller", n_kept=6)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (smaller / name).write_bytes((source / name).read_bytes())
        file = export_files(smaller, folder, [plain("F32")])["F32"]
        (folder / "text.txt").write_text(TEXT)
        found = compared(
            source, smaller, file, chunk=32, reference=smaller, text=str(folder / "text.txt")
        )
        assert [one.contents.experts for one in found.models] == [(8,), (6,), (6,)]
        assert not any(one.not_evaluated for one in found.models)
        of_file, of_source = (found.divergence(label) for label in ("F32.gguf", "source"))
        assert of_file is not None
        assert of_source is not None
        assert abs(of_file.mean.value) < 1e-6 < of_source.mean.value


def test_what_does_not_fit_is_told_and_its_sizes_compared(files: Path, tmp_path: Path) -> None:
    other = TinyQwen3Moe(n_layers=2).write(tmp_path / "other")
    odd = altered(files / "ours-Q4_K_M.gguf", tmp_path / "odd.gguf", arch__expert_gating_func=2)
    tokens = list(read_gguf_header(files / "BF16.gguf").metadata["tokenizer.ggml.tokens"])
    swapped = [tokens[1], tokens[0], *tokens[2:]]
    swapped[300:600] = swapped[300:600][::-1]
    strange = altered(
        files / "ours-Q4_K_M.gguf", tmp_path / "strange.gguf", tokenizer__ggml__tokens=swapped
    )
    found = compared(EXAMPLE, other, odd, strange, text=str(files / "text.txt"))
    reasons = {one.label: one.not_evaluated for one in found.models}
    assert not reasons["tiny-qwen3-moe"]
    assert reasons["other"] == "n_layers is 2, but tiny-qwen3-moe has 4"
    assert "expert_gating_func is 2" in reasons["odd.gguf"]
    assert "but" in reasons["strange.gguf"]
    assert "in tiny-qwen3-moe" in reasons["strange.gguf"]
    assert all(one.contents.n_file_bytes for one in found.models)
    assert found.evaluation is None  # the reference alone is no comparison
    text = "\n".join(comparison_lines(found, 100))
    assert "other: not evaluated: n_layers is 2, but tiny-qwen3-moe has 4" in text
    with pytest.raises(UsageError, match=r"odd.gguf: cannot be the reference: .*gating_func"):
        compared(EXAMPLE, odd, reference=odd, text=str(files / "text.txt"))


def test_unused_tokens_may_have_other_names(files: Path, tmp_path: Path) -> None:
    tokens = list(read_gguf_header(files / "BF16.gguf").metadata["tokenizer.ggml.tokens"])
    tokens[-1] = "<|PAD_TOKEN|>"
    renamed = altered(
        files / "ours-Q4_K_M.gguf", tmp_path / "renamed.gguf", tokenizer__ggml__tokens=tokens
    )
    found = compared(EXAMPLE, renamed, text=str(files / "text.txt"))
    assert found.divergence("renamed.gguf") is not None


def test_an_architecture_that_is_not_known(files: Path, tmp_path: Path) -> None:
    header = read_gguf_header(files / "ours-Q4_K_M.gguf")
    metadata = {**header.metadata, "general.architecture": "llama", "general.file_type": 9999}
    found = contents_of_gguf(replace(header, metadata=metadata))
    assert (found.architecture, found.file_type, found.experts) == ("llama", "unknown", (16,))
    assert found.experts_per_token is None
    assert found.total == contents_of_gguf(header).total


def test_folders_of_files_and_parts(files: Path, tmp_path: Path) -> None:
    plan = plan_split(files / "ours-Q4_K_M.gguf", 2**22)
    with Silent().task("", 0, "") as task:
        for part in plan.parts:
            write_part(plan, part, tmp_path, task)
    (tmp_path / "imatrix.gguf").write_bytes(b"no model")
    (tmp_path / "copy.gguf").symlink_to(files / "BF16.gguf")
    found = reap2gguf.compare(tmp_path, files / "BF16.gguf", files / "BF16.gguf", quality=False)
    first = plan.parts[0].name
    labels = [one.label for one in found.models]
    assert labels == ["copy.gguf", first, "BF16.gguf", "BF16.gguf (2)"]
    n_bytes = {one.label: one.contents.n_file_bytes for one in found.models}
    assert n_bytes[first] == sum(part.n_bytes for part in plan.parts)


def test_a_file_on_the_hub(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three: reap2gguf.ModelComparison
) -> None:
    path = files / "theirs-Q3_K_M.gguf"
    contents = {f"sub/{path.name}": path.read_bytes()}
    with serving(contents, monkeypatch, tmp_path / "cache") as hub:
        found = compared(EXAMPLE, f"owner/name:sub/{path.name}", text=str(files / "text.txt"))
        cached = [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]
        assert hub.bytes_sent < 1.2 * path.stat().st_size
    assert cached == []
    label = f"owner/name:sub/{path.name}"
    here, there = three.divergence(path.name), found.divergence(label)
    assert here is not None
    assert here == there
    assert found.models[1].contents == three.models[2].contents


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nothing.gguf", "owner:name"):
        with ExitStack() as stack, pytest.raises(SourceError, match=r"owner/name:FILE\.gguf"):
            open_all([name], stack, Silent())
    with pytest.raises(UsageError, match="no model to compare"):
        reap2gguf.compare()
    with pytest.raises(UsageError, match="chunks"):
        reap2gguf.compare(EXAMPLE, chunks=1)
    monkeypatch.setattr("reap2gguf.comparing.opening._MOST", 1)
    with pytest.raises(UsageError, match="more than 1 files"):
        reap2gguf.compare(EXAMPLE, EXAMPLE, quality=False)


def test_nothing_is_computed_for_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "evaluate_variants", None)
    found = reap2gguf.compare(EXAMPLE, quality=False)
    assert found.evaluation is None
    assert found.reference == ""


# what people see


def test_lines(three: reap2gguf.ModelComparison) -> None:
    lines = list(comparison_lines(three, 80, by_layer=True))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    perplexity = three.perplexity("ours-Q4_K_M.gguf")
    assert perplexity is not None
    row = next(line for line in lines if "Q4_K_M.gguf" in line and "±" in line)
    assert row.split()[2:5] == [f"{perplexity.value:.4f}", "±", f"{perplexity.error:.4f}"]
    assert "  experts down     16.00    5.53    4.50" in lines
    assert "2: Q4_K 50 %, Q6_K 50 %" in text
    assert any(line.split()[:2] == ["layer", "3"] for line in lines)
    assert "62 tokens of text.txt in 2 chunks of 64" in " ".join(text.split())


@pytest.mark.parametrize("width", [20, 30, 44, 60])
def test_narrow_terminals(three: reap2gguf.ModelComparison, width: int) -> None:
    lines = list(comparison_lines(three, width))
    assert max(map(len, lines)) <= max(width, 40)
    assert sum("same top" in line for line in lines) >= 1


def test_many_models_have_several_tables() -> None:
    found = reap2gguf.compare(*[EXAMPLE] * 20, quality=False)
    lines = list(comparison_lines(found, 80))
    assert max(map(len, lines)) <= 80
    heads = [line.split() for line in lines if line.split()[:1] in (["1"], ["9"], ["17"])]
    assert [str(n) for n in range(9, 17)] in heads


def test_a_picture(three: reap2gguf.ModelComparison, tmp_path: Path, files: Path) -> None:
    from matplotlib.image import imread

    title, points = points_of(three)
    assert title == "KL divergence from tiny-qwen3-moe"
    assert [point.name for point in points] == ["ours-Q4_K_M", "theirs-Q3_K_M"]
    path = tmp_path / "sizes.png"
    found = reap2gguf.compare(EXAMPLE, files / "BF16.gguf", quality=False, picture=path)
    assert points_of(found)[0] == "bits per weight"
    image = imread(path)
    assert image.shape[0] > 500
    # not all of one colour: the points are there
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20


class Killed(Exception):
    """The comparison was stopped."""


def test_an_interrupted_comparison_resumes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reap2gguf.observing.state.MOST_OF_TIME", 1e9)  # each layer is saved
    output = tmp_path / "found.json"
    ours, theirs = files / "ours-Q4_K_M.gguf", files / "theirs-Q3_K_M.gguf"
    seen = 0

    def stop(event: reap2gguf.ProgressEvent) -> None:
        nonlocal seen
        seen += event.kind == "advance"
        if seen > 5:
            raise Killed

    with pytest.raises(Killed):
        compared(ours, theirs, output=output, progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {
        "found.json.state.0", "found.json.state.1",
    }  # fmt: skip
    notes: list[str] = []

    def note(event: reap2gguf.ProgressEvent) -> None:
        if event.kind == "note":
            notes.append(event.text)

    found = compared(ours, theirs, output=output, progress=note)
    assert any("resuming" in text for text in notes)
    assert found.evaluation == compared(ours, theirs).evaluation
    assert json.loads(output.read_text()) == found.as_json()
    assert list(tmp_path.iterdir()) == [output]


def test_an_output_is_no_model(files: Path, tmp_path: Path) -> None:
    ours = files / "ours-Q4_K_M.gguf"
    link = tmp_path / "link.json"
    link.hardlink_to(ours)
    before = ours.read_bytes()
    for output, model in ((ours, ours), (link, ours), (ours, files)):
        for what in ("output", "picture"):
            with pytest.raises(UsageError, match="it is a file of the model"):
                compared(model, quality=False, **{what: output})
    assert ours.read_bytes() == before
    with pytest.raises(UsageError, match="the picture is written there"):
        compared(ours, quality=False, picture=tmp_path / "a", output=tmp_path / "a")


def test_two_models_are_shown_by_perplexity(three: reap2gguf.ModelComparison, files: Path) -> None:
    found = replace(three, models=three.models[:2])
    title, points = points_of(found)
    assert title == "perplexity"
    assert all(math.isfinite(point.height.error) for point in points)


def test_the_command(files: Path, tmp_path: Path) -> None:
    arguments = (files / "ours-Q4_K_M.gguf", files / "theirs-Q3_K_M.gguf")
    sizes = run("compare", *arguments, "--no-quality", "--picture", tmp_path / "p.png")
    assert sizes.exit_code == 0, sizes.output
    assert "perplexity" not in sizes.output
    assert (tmp_path / "p.png").is_file()
    quick = ("--text", files / "text.txt", "--chunk", "64", "--chunks", "2", "--device", "cpu")
    result = run("compare", *arguments, *quick, "--json", "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["reference"] == "ours-Q4_K_M.gguf"
    assert values["evaluation"]["comparisons"][0]["divergence"]["mean"]["value"] > 0
    broken = run("compare", "nothing.gguf")
    assert broken.exit_code == 2
    assert "owner/name:FILE.gguf" in broken.output
