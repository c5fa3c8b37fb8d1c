"""Tensor types and file types by the names that llama.cpp's and ik_llama.cpp's programs take."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from reap2gguf.errors import RecipeError
from reap2gguf.ggml import STORABLE
from reap2gguf.gguf_files.tensor_types import IkType
from reap2gguf.messages import shown
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES, REFUSED
from reap2gguf.quantizing.recipe import ALIASES
from reap2gguf.quantizing.type_names import tensor_type_named

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Type

    from reap2gguf.quantizing.recipe import Recipe

# tensor types and file types of ik_llama.cpp alone, but for those that this program has
_ONLY_IK = re.compile(
    r"IQ\d_(K|KS|KSS|KL|KT|BN)(_R4)?|Q6_0(_R4)?|Q8_KV(_R8)?|Q8_K_R8|I2_S|Q4_0_\d_\d"
    r"|\w+_R(4|8|16)"
)
_REPACKED = re.compile(r"(\w+)_R(?:4|8|16)")
_DEFAULT = "Q4_K_M"
_MOST_NAMED = 6


_WRITABLE = {one.name for one in (*STORABLE, *IkType)}


def is_only_ik(name: str) -> bool:
    """Whether a type is one of ik_llama.cpp that this program does not write."""
    upper = name.upper()
    return _ONLY_IK.fullmatch(upper) is not None and upper not in _WRITABLE


def plain_name(name: str) -> str:
    """The type whose values a repacked type of ik_llama.cpp has, if this program has it.

    >>> plain_name("q4_k_r4"), plain_name("q4_k"), plain_name("q6_0_r4")
    ('q4_k', 'q4_k', 'q6_0_r4')
    """
    match = _REPACKED.fullmatch(name.upper())
    if match and match[1] in _WRITABLE:
        return name[: len(match[1])]
    return name


def read_type(name: str, where: str) -> Type:
    """A tensor type by its name. Raises RecipeError, which begins with `where`."""
    if is_only_ik(name):
        raise RecipeError(f"{where}: {_only_ik([name])}")
    return tensor_type_named(name, f"{where}: type", is_ik=True)


def check_base(types: Iterable[Type], base: Recipe, where: str) -> None:
    """Raise RecipeError if some types are ik_llama.cpp's, and the file type of the base is not."""
    found = [one.name.lower() for one in types if isinstance(one, IkType)]
    if found and not base.is_ik:
        raise RecipeError(
            f"{where}: {_some(found)} only in ik_llama.cpp, and a file of {base.file_type} is one "
            f"for llama.cpp; pass --base {found[0].upper()}, or write types of llama.cpp"
        )


def refuse_only_ik(names: Iterable[str], where: str) -> None:
    """Raise RecipeError if some of these types are ik_llama.cpp's alone; it names all of them."""
    found = [name.lower() for name in names if is_only_ik(name)]
    if found:
        raise RecipeError(f"{where}: {_only_ik(found)}")


def _only_ik(names: Sequence[str]) -> str:
    return (
        f"{_some(names)} only in ik_llama.cpp, and reap2gguf does not write such tensors; write "
        "another type, such as IQ4_K for files that ik_llama.cpp alone loads, or Q4_K"
    )


def _some(names: Sequence[str]) -> str:
    """Names and how often each occurs, and a verb."""
    counted = Counter(names)
    words = [f"{name} ({n} rules)" if n > 1 else name for name, n in counted.items()]
    if (more := len(words) - _MOST_NAMED) > 0:
        words = [*words[:_MOST_NAMED], f"{more} more"]
    return f"{', '.join(words)} {'exists' if len(counted) == 1 else 'exist'}"


def read_file_type(name: str, where: str) -> str | None:
    """The file type that a name or a number means to llama-quantize; None for another word.

    Raises RecipeError for one that this program cannot write.
    """
    upper = name.upper()
    if upper in ALIASES or upper in MIXTURES or upper in IK_MIXTURES:
        return ALIASES.get(upper, upper)
    if upper in REFUSED:
        raise RecipeError(f"{where}: file type {shown(name)} is not supported: {REFUSED[upper]}")
    if is_only_ik(upper):
        raise RecipeError(
            f"{where}: the file type {shown(name)} exists only in ik_llama.cpp, and reap2gguf does "
            "not write it; pass --base with the file type or recipe for tensors that no rule "
            "matches, such as Q4_K_M"
        )
    numbers = {str(int(one.file_type)): known for known, one in MIXTURES.items()}
    return numbers.get(name)


def usual_file_type(types: Sequence[Type]) -> str:
    """A file type for tensors that no rule matches: that of the type that most rules have."""
    if of_ik := Counter(one.name for one in types if isinstance(one, IkType)):
        return of_ik.most_common(1)[0][0]
    counted = Counter(one.name for one in types if one.name not in ("F32", "F16", "BF16"))
    for name, _ in counted.most_common(1):
        return next((one for one in (f"{name}_M", name) if one in MIXTURES), _DEFAULT)
    return _DEFAULT
