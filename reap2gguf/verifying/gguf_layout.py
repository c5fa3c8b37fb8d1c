"""Where the tensors of a GGUF file lie: in their order, without gaps, and nothing behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gguf import GGUFValueType, Keys

from reap2gguf.errors import ArtifactError
from reap2gguf.files import open_plain
from reap2gguf.gguf_files.split import SplitHeader
from reap2gguf.gguf_files.writer import padded
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader

# as llama.cpp's gguf-split writes them
_SPLIT_KINDS = {
    Keys.Split.LLM_KV_SPLIT_NO: (GGUFValueType.UINT16,),
    Keys.Split.LLM_KV_SPLIT_COUNT: (GGUFValueType.UINT16,),
    Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: (GGUFValueType.INT32,),
}


def check_layout(header: GgufHeader) -> Iterator[str]:
    """Violations in how a file, or each of its parts, is laid out.

    Every writer puts the tensors into the order of the header, each padded with zeros to the
    alignment, and ends the file there. Memory: one padding.
    """
    if not isinstance(header, SplitHeader):
        yield from _check_file(header)
        return
    for number, part in enumerate(header.parts):
        yield from _check_file(part)
        for key, kind in part.kinds.items():
            if key in _SPLIT_KINDS:
                if kind != _SPLIT_KINDS[key]:
                    wanted = _SPLIT_KINDS[key][0].name
                    yield f"{part.path.name}: {key} is of type {kind[0].name}, expected {wanted}"
            elif number:
                yield f"{part.path.name}: has the key {shown(key)}, which belongs in the first part"


def _check_file(header: GgufHeader) -> Iterator[str]:
    where = header.path.name
    infos = sorted(header.tensors.values(), key=lambda info: info.offset)
    if [info.name for info in infos] != list(header.tensors):
        yield f"{where}: its tensors lie in another order than its header lists them"
    end = header.infos_end
    paddings = []  # first and last byte of each
    for info in infos:
        begin = padded(end, header.alignment)
        paddings.append((end, begin))
        if info.offset != begin:
            gap = info.offset - begin
            yield f"{where}: {gap:,} bytes that belong to no tensor lie before {shown(info.name)}"
        end = info.offset + info.n_bytes
    after = padded(end, header.alignment)
    paddings.append((end, min(after, header.n_bytes)))
    # some programs leave the last padding out
    if header.n_bytes not in (end, after):
        yield f"{where}: has {header.n_bytes - end:,} bytes after its last tensor"
    yield from _check_zeros(header, paddings)


def _check_zeros(header: GgufHeader, paddings: list[tuple[int, int]]) -> Iterator[str]:
    """One violation at most: a byte of a padding that is not zero."""
    try:
        with open_plain(header.path) as file:
            for begin, end in paddings:
                file.seek(begin)
                if any(file.read(end - begin)):
                    yield f"{header.path.name}: the padding at byte {begin:,} is not zero"
                    return
    except OSError as error:
        reason = error.strerror or error
        raise ArtifactError(f"{header.path}: cannot be read ({reason})") from error
