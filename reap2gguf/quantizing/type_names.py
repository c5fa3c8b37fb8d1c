"""Names of tensor types as people write them, and what those may mean who write another one."""

from __future__ import annotations

import difflib
import re

from gguf import GGMLQuantizationType

from reap2gguf.errors import RecipeError
from reap2gguf.ggml import STORABLE
from reap2gguf.gguf_files.tensor_types import IkType
from reap2gguf.messages import shown
from reap2gguf.quantizing.file_types import REFUSED


def tensor_type_named(name: str, where: str, is_ik: bool = False) -> GGMLQuantizationType:
    """A tensor type by its name, in any case. Raises RecipeError, which begins with `where`.

    With `is_ik` those of ik_llama.cpp are known as well.
    """
    known = {storable.name for storable in STORABLE}
    upper = name.upper().replace("-", "_")
    if is_ik and upper in IkType.__members__:
        return IkType[upper]
    if upper not in known:
        if upper in REFUSED and upper in GGMLQuantizationType.__members__:
            raise RecipeError(f"{where} {shown(name)} is not supported: {REFUSED[upper]}")
        hint = _foreign_hint(upper) or _nearest_type(upper)
        raise RecipeError(f"{where} {shown(name)} is not a GGML tensor type; {hint}")
    return GGMLQuantizationType[upper]


def _foreign_hint(tensor_type: str) -> str:
    """File types and ik_llama.cpp's types are what people confuse with tensor types."""
    if re.fullmatch(r"Q\d_K_[SML]", tensor_type):
        return f"{tensor_type} is a file type, the tensor type is {tensor_type[:4]}"
    if tensor_type == "MXFP4_MOE":
        return "MXFP4_MOE is a file type, the tensor type is MXFP4"
    if re.fullmatch(r"IQ\d_K[STL]{0,2}", tensor_type):
        return (
            "it exists only in ik_llama.cpp, and llama.cpp cannot load it; recipes of a file type "
            "of ik_llama.cpp may have it, such as ik-iq4k"
        )
    return ""


def _nearest_type(tensor_type: str) -> str:
    known = sorted(storable.name for storable in STORABLE)
    near = difflib.get_close_matches(tensor_type, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
