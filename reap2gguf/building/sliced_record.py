"""The record of a GGUF file that was sliced out of another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.records import GgufRecord
from reap2gguf.gguf_files.part_names import parse_part_name, part_name

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.building.plan import Plan


def sliced_record(plan: Plan, folder: Path) -> GgufRecord:
    """The record of the file: it has no recipe, as what quantized it was another program."""
    (recipe,) = plan.recipes
    file = plan.gguf_name(recipe)
    stem = file.removesuffix(".gguf")
    found = (parse_part_name(path.name) for path in folder.glob("*.gguf"))
    n_parts = next((part.count for part in found if part is not None and part.stem == stem), 0)
    parts = [part_name(stem, number, n_parts) for number in range(n_parts)]
    n_bytes = sum((folder / name).stat().st_size for name in parts or [file])
    return GgufRecord(
        file=file,
        recipe="",
        title=recipe.title,
        label=recipe.label,
        file_type=recipe.file_type,
        recipe_source="",
        n_bytes=n_bytes,
        bits_per_weight=round(recipe.bits_per_weight, 4),
        tensors={name: one.name for name, one in recipe.tensor_types().items()},
        adopted=True,
        source_blocks=len(recipe.table),
        parts=tuple(parts),
    )
