from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.index import INDEX_NAME, SINGLE_NAME
from reap2gguf.errors import CheckpointError, SourceError
from reap2gguf.tokenizer.tokenizer_files import read_tokenizer_json
from tests.tiny import TinyQwen3Moe, save_sharded

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(6, 5, generator=generator).to(torch.bfloat16),
        "cube": torch.randn(4, 3, 5, generator=generator).to(torch.bfloat16),
        "half": torch.randn(3, 4, generator=generator).to(torch.float16),
        "single": torch.randn(7, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(5),
    }


def folder_of(path: Path, n_shards: int = 1, config: str = '{"a": 1}') -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    save_sharded(weights(), path, n_shards)
    return path


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = value
    path.write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(folder_of(tmp_path / "model")) as opened:
        yield opened


@pytest.mark.parametrize("n_shards", [1, 2, 3])
def test_open(tmp_path: Path, n_shards: int) -> None:
    expected = weights()
    with Checkpoint.open(folder_of(tmp_path / "model", n_shards)) as checkpoint:
        assert checkpoint.config == {"a": 1}
        assert len(checkpoint.shards) == n_shards
        assert set(checkpoint.tensors) == set(expected)
        assert checkpoint.n_parameters == sum(w.numel() for w in expected.values())
        assert checkpoint.n_bytes == sum(w.numel() * w.element_size() for w in expected.values())
        for name in ("matrix", "cube", "half", "single", "scalar", "empty"):
            assert np.array_equal(checkpoint.read_float32(name), expected[name].float().numpy())


def test_the_example(example: Path) -> None:
    with Checkpoint.open(example) as checkpoint:
        total = json.loads((example / INDEX_NAME).read_text())["metadata"]["total_size"]
        assert checkpoint.n_bytes == total


@pytest.mark.parametrize(("first", "last"), [(0, None), (2, None), (0, 3), (1, 4), (3, 3), (5, 6)])
def test_rows(checkpoint: Checkpoint, first: int, last: int | None) -> None:
    expected = weights()["matrix"][first:last]
    found = checkpoint.read_float32("matrix", first, last)
    assert found.shape == tuple(expected.shape)
    assert np.array_equal(found, expected.float().numpy())


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("first", "last"), [(0, None), (1, None), (0, 2), (1, 2)])
def test_rows_of_one_expert(
    checkpoint: Checkpoint, index: int, first: int, last: int | None
) -> None:
    expected = weights()["cube"][index, first:last]
    assert np.array_equal(
        checkpoint.read_float32("cube", first, last, index), expected.float().numpy()
    )


def test_one_value_by_index(checkpoint: Checkpoint) -> None:
    assert checkpoint.read("ids", index=3) == 3


def test_bf16_is_read_as_bits(checkpoint: Checkpoint) -> None:
    bits = checkpoint.read("matrix")
    assert bits.dtype == np.uint16
    assert np.array_equal(bits, weights()["matrix"].view(torch.uint16).numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_value_widens_as_in_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": everything}, tmp_path / SINGLE_NAME)
    with Checkpoint.open(tmp_path) as checkpoint:
        found = checkpoint.read_float32("w")
    assert found.dtype == np.float32
    assert np.array_equal(found, everything.float().numpy(), equal_nan=True)
    assert np.array_equal(np.signbit(found), everything.float().signbit().numpy())


def test_float32_keeps_its_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0, 1, 2**31 - 1, -1, -(2**31), 0x7F800000, 0x00400000], dtype=torch.int32)
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": bits.view(torch.float32)}, tmp_path / SINGLE_NAME)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint.read_float32("w").view(np.int32), bits.numpy())


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.float64, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
def test_other_dtypes_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"some.scale": torch.ones(3).to(dtype)}, tmp_path / SINGLE_NAME)
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"'some\.scale'.*expected F32, F16 or BF16"),
    ):
        checkpoint.read_float32("some.scale")


def test_integers_are_read_as_stored(checkpoint: Checkpoint) -> None:
    assert checkpoint.read("ids", 1, 4).tolist() == [1, 2, 3]


def test_no_such_tensor(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'absent\.weight'"):
        checkpoint.read("absent.weight")


def test_threads_share_a_checkpoint(checkpoint: Checkpoint) -> None:
    expected = weights()["cube"].float().numpy()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: checkpoint.read_float32("cube", index=i % 4), range(200)))
    assert all(np.array_equal(value, expected[i % 4]) for i, value in enumerate(found))


def test_reading_after_close(checkpoint: Checkpoint) -> None:
    before = checkpoint.read("matrix")
    checkpoint.close()
    assert np.array_equal(checkpoint.read("matrix"), before)


def test_close_closes_the_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_of(tmp_path / "model", 2))
    before = len(os.listdir("/dev/fd"))
    checkpoint.fingerprint()
    assert len(os.listdir("/dev/fd")) == before + 2
    checkpoint.close()
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_cut_after_opening(checkpoint: Checkpoint) -> None:
    last = max(checkpoint.tensors.values(), key=lambda tensor: tensor.offset + tensor.n_bytes)
    os.truncate(last.path, last.offset + last.n_bytes - 1)
    with pytest.raises(CheckpointError, match=rf"ends inside tensor '{last.name}'"):
        checkpoint.read(last.name)


def test_a_file_removed_after_opening(checkpoint: Checkpoint) -> None:
    checkpoint.shards[0].unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        checkpoint.read("matrix")


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = Checkpoint.open(folder_of(tmp_path / "first", 2))
    second = Checkpoint.open(folder_of(tmp_path / "second", 2))
    with first, second:
        assert first.fingerprint() == second.fingerprint() == first.fingerprint()


def test_fingerprint_sees_every_byte_of_a_small_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    path = folder / SINGLE_NAME
    content = path.read_bytes()
    with Checkpoint.open(folder) as checkpoint:
        start = min(tensor.offset for tensor in checkpoint.tensors.values())
        seen = {checkpoint.fingerprint()}
        for position in range(start, len(content)):
            changed = bytearray(content)
            changed[position] ^= 1
            path.write_bytes(changed)
            seen.add(checkpoint.fingerprint())
    assert len(seen) == 1 + len(content) - start


def test_fingerprint_sees_every_tensor_of_a_large_file(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((40_000,), float(i)) for i in range(100)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        seen = {checkpoint.fingerprint()}
    for name in ("w0", "w37", "w99"):
        save_file(tensors | {name: -tensors[name] - 1}, tmp_path / SINGLE_NAME)
        with Checkpoint.open(tmp_path) as checkpoint:
            seen.add(checkpoint.fingerprint())
    assert len(seen) == 4


def test_fingerprint_sees_the_config(tmp_path: Path) -> None:
    with Checkpoint.open(folder_of(tmp_path / "model")) as checkpoint:
        before = checkpoint.fingerprint()
        (checkpoint.folder / "config.json").write_text('{"a": 2}')
        assert checkpoint.fingerprint() != before


@pytest.mark.parametrize("quarter", range(4))
def test_fingerprint_samples_all_of_a_large_file(tmp_path: Path, quarter: int) -> None:
    weight = torch.zeros(4, 2**19)
    seen = set()
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": weight}, tmp_path / name / SINGLE_NAME)
        with Checkpoint.open(tmp_path / name) as checkpoint:
            seen.add(checkpoint.fingerprint())
        weight[quarter] = 1
    assert len(seen) == 2


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(SourceError, match="no such folder"):
        Checkpoint.open(tmp_path / "model")


def test_no_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("config", ["", "{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "\ufeff{}"])
def test_broken_config(tmp_path: Path, config: str) -> None:
    assert "config.json" in refusal(folder_of(tmp_path / "model", config=config))


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert SINGLE_NAME in message
    assert INDEX_NAME in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps({"w": 1}))
    assert "pickled" in refusal(tmp_path)


def test_missing_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 2)
    (folder / SECOND).unlink()
    message = refusal(folder)
    assert "1 of 2 shards missing" in message
    assert SECOND in message


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", 7])
def test_index_must_name_files_of_the_folder(tmp_path: Path, name: Any) -> None:
    folder = folder_of(tmp_path / "model", 2)
    save_file({"matrix": torch.ones(1)}, tmp_path / "x.safetensors")
    edit_index(folder, matrix=name)
    message = refusal(folder)
    assert INDEX_NAME in message
    assert repr(name) in message


@pytest.mark.parametrize("name", [["a"], {"file": "a"}, None])
def test_index_with_values_that_are_no_names(tmp_path: Path, name: Any) -> None:
    folder = folder_of(tmp_path / "model", 2)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"matrix": name}}))
    assert INDEX_NAME in refusal(folder)


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_index_naming_folders(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "model", 2)
    edit_index(folder, matrix=name)
    refusal(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", "x"])
def test_index_without_a_map(tmp_path: Path, index: str) -> None:
    folder = folder_of(tmp_path / "model", 2)
    (folder / INDEX_NAME).write_text(index)
    assert INDEX_NAME in refusal(folder)


def test_index_names_a_tensor_that_no_shard_holds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 2)
    edit_index(folder, **{"ghost.weight": FIRST})
    message = refusal(folder)
    assert "in no shard" in message
    assert "'ghost.weight'" in message


def test_a_shard_holds_a_tensor_that_the_index_lacks(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 2)
    edit_index(folder, matrix=None)
    message = refusal(folder)
    assert "not in the index" in message
    assert "'matrix'" in message


def test_index_names_the_wrong_shard(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 2)
    right = json.loads((folder / INDEX_NAME).read_text())["weight_map"]["matrix"]
    wrong = SECOND if right == FIRST else FIRST
    edit_index(folder, matrix=wrong)
    message = refusal(folder)
    assert f"'matrix' is in {right}" in message
    assert wrong in message


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 2)
    save_file({"matrix": torch.ones(2), "cube": torch.ones(2)}, folder / FIRST)
    save_file({"matrix": torch.ones(2)}, folder / SECOND)
    index = {"weight_map": {"matrix": FIRST, "cube": FIRST, "other": SECOND}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    message = refusal(folder)
    assert SECOND in message
    assert "'matrix'" in message


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 2)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    message = refusal(folder)
    assert SECOND in message
    assert "truncated" in message


def test_tokenizer_json(tiny: Path) -> None:
    assert read_tokenizer_json(tiny) == json.loads((tiny / "tokenizer.json").read_text())
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        read_tokenizer_json(tiny)


def test_sharded_and_single_tell_the_same(tmp_path: Path) -> None:
    one = Checkpoint.open(TinyQwen3Moe(vocab=64).write(tmp_path / "one"))
    four = Checkpoint.open(TinyQwen3Moe(vocab=64, n_shards=4).write(tmp_path / "four"))
    with one, four:
        assert set(one.tensors) == set(four.tensors)
        for name in one.tensors:
            assert np.array_equal(one.read(name), four.read(name))


@pytest.mark.parametrize("has_shards", [True, False])
def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path, has_shards: bool) -> None:
    folder = folder_of(tmp_path / "model", 2)
    save_file({"other": torch.arange(3)}, folder / SINGLE_NAME)
    if not has_shards:
        (folder / FIRST).unlink()
        (folder / SECOND).unlink()
    with Checkpoint.open(folder) as opened:
        assert list(opened.tensors) == ["other"]
        assert [shard.name for shard in opened.shards] == [SINGLE_NAME]
        (note,) = opened.notes
    assert f"{SINGLE_NAME} is used, as in transformers, and {INDEX_NAME}" in note


def test_transformers_loads_one_file_and_not_the_index(tmp_path: Path) -> None:
    TinyQwen3Moe(n_shards=2, seed=0).write(tmp_path)
    name = "model.layers.0.mlp.gate.weight"
    tensors = TinyQwen3Moe(seed=5).tensors()
    save_file(tensors, tmp_path / SINGLE_NAME, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[name]
    assert torch.equal(loaded, tensors[name])
    with Checkpoint.open(tmp_path) as opened:
        np.testing.assert_array_equal(opened.read_float32(name), loaded.float().numpy())


def test_an_adapter_beside_the_weights_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with Checkpoint.open(folder) as opened:
        assert "an adapter (adapter_config.json) lies beside the weights" in opened.notes[0]


def without_index(path: Path, n_shards: int = 3) -> Path:
    folder = folder_of(path, n_shards)
    (folder / INDEX_NAME).unlink()
    return folder


def test_shards_without_an_index_say_themselves_what_they_hold(tmp_path: Path) -> None:
    indexed, bare = folder_of(tmp_path / "indexed", 3), without_index(tmp_path / "bare")
    with Checkpoint.open(indexed) as expected, Checkpoint.open(bare) as found:
        assert list(found.tensors) == list(expected.tensors)
        assert found.fingerprint() == expected.fingerprint()
        assert expected.notes == ()
        (note,) = found.notes
    assert note == f"{bare}: no {INDEX_NAME}; the headers of its 3 shards are used instead"


def test_the_names_of_shards_that_qwen_uses(tmp_path: Path) -> None:
    folder = without_index(tmp_path / "model", 2)
    for shard in folder.glob("*.safetensors"):
        shard.rename(folder / shard.name.replace("model-", "model.safetensors-"))
    with Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(weights())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "number 2 is miss"),
        (lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(), "number 3 is miss"),
        (lambda folder: (folder / "model-00003-of-00003.safetensors").rename(
            folder / "model-00004-of-00003.safetensors"), "number 3 is missing"),
        (lambda folder: save_file({"x": torch.ones(1)},
                                  folder / "model-00000-of-00003.safetensors"), "number 0 is"),
        (lambda folder: save_file({"x": torch.ones(1)},
                                  folder / "model-00001-of-00002.safetensors"), "of 2 sets"),
        (lambda folder: save_file({"x": torch.ones(1)},
                                  folder / "other-00001-of-00003.safetensors"), "of 2 sets"),
        (lambda folder: save_file({"matrix": torch.ones(1), "cube": torch.ones(1)},
                                  folder / "model-00001-of-00003.safetensors"), "another shard"),
    ],
)  # fmt: skip
def test_shards_with_gaps_or_doubles_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    folder = without_index(tmp_path / "model")
    change(folder)
    assert words in refusal(folder)


def test_weights_of_another_name_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / SINGLE_NAME).rename(folder / "consolidated.safetensors")
    assert "rename 'consolidated.safetensors' if it holds the weights" in refusal(folder)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_weights_on_another_disk(tmp_path: Path, n_shards: int) -> None:
    folder, disk = folder_of(tmp_path / "model", n_shards), tmp_path / "disk"
    disk.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        before = checkpoint.fingerprint()
    for shard in folder.glob("*.safetensors"):
        shard.rename(disk / shard.name)
        shard.symlink_to(disk / shard.name)
    assert "pass --follow-links" in refusal(folder)
    with Checkpoint.open(folder, follow_links=True) as checkpoint:
        assert checkpoint.fingerprint() == before
        assert np.array_equal(checkpoint.read_float32("half"), weights()["half"].float().numpy())


def test_only_weights_may_be_links(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="a link, which is not followed") as caught:
        Checkpoint.open(folder, follow_links=True)
    assert "--follow-links" not in str(caught.value)


def test_links_of_weights_lead_to_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / SINGLE_NAME).unlink()
    (folder / SINGLE_NAME).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a device, expected a file"):
        Checkpoint.open(folder, follow_links=True)


def test_a_shard_that_becomes_a_link_after_opening(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shard = checkpoint.shards[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link, which is not followed"):
        checkpoint.read("matrix")
