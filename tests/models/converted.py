"""What llama.cpp's own converter makes of the tiny checkpoints, recorded.

    python -m tests.models.converted LLAMA_CPP_FOLDER

runs `convert_hf_to_gguf.py`'s classes from the source of llama.cpp on a checkpoint of every
architecture and writes tests/data/converted. The tests compare what this program writes with it,
and need no source of llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.description import SideFile
from reap2gguf.models.table import describe
from tests.models.layouts import LAYOUTS, RECORDED, Case
from tests.tiny import REPOSITORY, child_environment

FOLDER = REPOSITORY / "tests" / "data" / "converted"
KINDS = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16"}
PROJECTOR = "projector"
_PROJECTOR_KIND = "MOSTLY_F16"
_MOST_ITEMS = 16
# Tests of their own compare the keys `general.*`, the splitting of texts and the template.
_ELSEWHERE = ("general.", "reap2gguf.", "tokenizer.ggml.pre", "tokenizer.chat_template", "GGUF.")

# The converter knows a tokenizer by the ids of a text, and that of the tests is none of those.
_CONVERT = """
import sys
from pathlib import Path
source, folder, kind, output, architecture = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]
import gguf
from conversion import base, get_model_class
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
for name in ("_set_vocab_glm", "_set_vocab_sentencepiece"):
    setattr(base.TextModel, name, lambda self, *_: self._set_vocab_gpt2())
get_model_class(architecture, mmproj=kind == "MOSTLY_F16")(
    Path(folder), gguf.LlamaFileType[kind], Path(output), eager=True
).write()
"""


def contents(path: Path) -> dict[str, Any]:
    """Types, shapes and hashes of the tensors of a GGUF file, and its keys."""
    reader = GGUFReader(path)
    tensors = {
        t.name: [
            t.tensor_type.name,
            [int(size) for size in t.shape],
            hashlib.sha256(t.data.tobytes()).hexdigest()[:16],
        ]
        for t in reader.tensors
    }
    keys = {
        name: _short(field.contents())
        for name, field in reader.fields.items()
        if not name.startswith(_ELSEWHERE)
    }
    return {"keys": dict(sorted(keys.items())), "tensors": dict(sorted(tensors.items()))}


def side_files(folder: Path) -> tuple[SideFile, ...]:
    """The files beside the model's own that this program writes."""
    with Checkpoint.open(folder) as checkpoint:
        return describe(checkpoint).side_files(folder, checkpoint.tensors)


def _short(value: Any) -> Any:
    """A value of a header; a long list as its length and hash."""
    if isinstance(value, list) and len(value) > _MOST_ITEMS:
        encoded = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
        return f"{len(value)} items, {hashlib.sha256(encoded).hexdigest()[:16]}"
    return value


def record(source: Path, case: Case) -> dict[str, Any]:
    """What llama.cpp's converter makes of one layout, by kind of file."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = case.tiny.write(Path(scratch) / "model")
        config = folder / "config.json"
        # of which it asks transformers, which knows the type by the model's own code only
        config.write_text(config.read_text().replace('"kimi_k2"', '"deepseek_v3"'))
        kinds = KINDS | ({PROJECTOR: _PROJECTOR_KIND} if side_files(folder) else {})
        for kind, file_type in kinds.items():
            output = Path(scratch) / f"{kind}.gguf"
            found[kind] = convert(source, folder, file_type, output, case.architecture)
    return found


def convert(
    source: Path, folder: Path, file_type: str, output: Path, architecture: str
) -> dict[str, Any]:
    """What llama.cpp's converter makes of a folder; CalledProcessError if it fails."""
    subprocess.run(
        [sys.executable, "-c", _CONVERT, source, folder, file_type, output, architecture],
        env=child_environment({}),
        check=True,
        capture_output=True,
    )
    return contents(output)


def main() -> None:
    """Record the published layouts of every architecture, or of those that are named."""
    source, *chosen = sys.argv[1:]
    for case in (case for case in RECORDED if case.architecture in (chosen or LAYOUTS)):
        try:
            found = record(Path(source), case)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{case}: {error.stderr.decode()[-2000:]}") from error
        path = FOLDER / f"{case.record}.json"
        parts = [("keys", found["F32"]["keys"])]
        parts += [(kind, one["tensors"]) for kind, one in found.items()]
        if PROJECTOR in found:
            parts.append((f"{PROJECTOR} keys", found[PROJECTOR]["keys"]))
        lines = [
            f' "{part}": {{\n'
            + ",\n".join(f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in entries.items())
            + "\n }"
            for part, entries in parts
        ]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
