"""The text around the tensors of a safetensors folder: headers of shards, and config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from tests.conftest import Bundle
from tests.verifying.mutations import copied, fix_hashes, rewrite

HEADERS_ONLY = Strictness(reads_values=False)


@pytest.fixture
def light(built: Bundle, tmp_path: Path) -> Bundle:
    """A copy that costs nothing: its files are links to those of the finished bundle."""
    return copied(built, tmp_path / "build")


def violations(bundle: Bundle, folder: Path | None = None) -> tuple[str, ...]:
    return verify_bundle(folder or bundle.gguf, 1, Silent(), HEADERS_ONLY).violations


def with_header(raw: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """A safetensors file with another header; its tensors stay."""
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(change(json.loads(raw[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {k: v for k, v in header.items() if k != "__metadata__"},
        lambda header: header | {"__metadata__": {"format": "tf"}},
        lambda header: header | {"__metadata__": {"format": "pt", "more": "x" * 1000}},
        lambda header: dict(reversed(header.items())),
    ],
    ids=["no metadata", "another format", "more metadata", "another order"],
)
def test_the_header_of_a_shard(
    light: Bundle, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    rewrite(light.hf / "model.safetensors", lambda raw: with_header(raw, change))
    fix_hashes(light)
    (found,) = violations(light)
    assert found.endswith("its header has other metadata or spaces than this program writes")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: raw + b" " * 500, "is not what this program writes"),
        (
            lambda raw: raw.replace(b'"rope_theta"', b'"quantization_config": {}, "rope_theta"'),
            "config.json is not one that pruning writes, by 'quantization_config'",
        ),
    ],
    ids=["spaces", "leftover"],
)
def test_the_text_of_the_config(
    light: Bundle, change: Callable[[bytes], bytes], expected: str
) -> None:
    rewrite(light.hf / "config.json", change)
    fix_hashes(light)
    assert any(expected in found for found in violations(light))


def test_folders_that_were_renamed_together(light: Bundle) -> None:
    renamed = Bundle(
        light.output,
        light.hf.rename(light.hf.with_name("mine")),
        light.gguf.rename(light.gguf.with_name("mine-GGUF")),
        light.source,
    )
    report = verify_bundle(renamed.gguf, 1, Silent(), HEADERS_ONLY)
    assert report.violations == ()
    assert report.checked == ("mine-GGUF", "mine")
