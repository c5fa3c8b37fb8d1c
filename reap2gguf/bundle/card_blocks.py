"""What a card says of files that were made from a GGUF file: whose blocks their tensors have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.markdown import code
from reap2gguf.checkpoint.quantized.keys import READ_FROM_GGUF

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.bundle.records import GgufRecord


def blocks_text(manifest: Manifest) -> str:
    """Whole sentences, in lines of a paragraph; the first begins in the middle of a line."""
    if all(record.source_blocks == len(record.tensors) for record in manifest.gguf):
        return (
            "All other tensors, and the\nexperts that stay, have the blocks of the source's GGUF "
            "file, byte for byte: nothing was\nquantized again."
        )
    if any(line.startswith(READ_FROM_GGUF) for line in manifest.caveats):
        begin = "The weights of the source\nwere quantized before. "
        others = "dequantized and\nquantized a second time, and have lost precision twice"
    else:
        begin, others = "", "quantized from its\nvalues"
    if len(manifest.gguf) == 1:
        (record,) = manifest.gguf
        kept = f"{_of_tensors(record)} tensors keep the source's\nblocks, byte for byte"
        return f"{begin}{kept}; the others were {others}."
    counts = "".join(f"\n- {code(one.file)}: {_of_tensors(one)}" for one in manifest.gguf)
    return (
        f"{begin}Tensors that have their\ntype in the source keep its blocks, byte for byte; the "
        f"others were {others}. Tensors with the source's blocks:\n{counts}\n\n"
    )


def _of_tensors(record: GgufRecord) -> str:
    return f"{record.source_blocks:,} of {len(record.tensors):,}"
