"""The kernels of gpu.cu: which there are, and how each is compiled. Nothing here needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gguf import GGMLQuantizationType

from reap2gguf.quantizing.kernels.codebooks import entries_shape

_T = GGMLQuantizationType
Weighted = tuple[GGMLQuantizationType, bool]  # a type, with importance or without


@dataclass(frozen=True)
class Form:
    """How a type is quantized on a GPU, and how it is read: both as structs of source/."""

    struct: str
    reader: str
    weighs_rows: bool = False  # with importance, by the mean square of the whole row
    registers: int = 128  # of a thread, at most: with fewer, more of them run at the same time
    n_threads: int = 1  # that work on a block: PARTS of a type with a codebook


# Every type that a GPU quantizes. A type is added here and nowhere else.
FORMS = {
    _T.Q4_0: Form("Symmetric<8>", "ReadPlain<false, false>", weighs_rows=True),
    _T.Q4_1: Form("Affine<15>", "ReadPlain<false, true>", weighs_rows=True),
    _T.Q5_0: Form("Symmetric<16>", "ReadPlain<true, false>", weighs_rows=True),
    _T.Q5_1: Form("Affine<31>", "ReadPlain<true, true>", weighs_rows=True),
    _T.Q8_0: Form("Q8", "ReadQ8"),
    _T.Q2_K: Form("Q2K", "ReadQ2K"),
    _T.Q3_K: Form("Q3K", "ReadQ3K"),
    _T.Q4_K: Form("AffineK<15>", "ReadAffineK<false>"),
    _T.Q5_K: Form("AffineK<31>", "ReadAffineK<true>"),
    _T.Q6_K: Form("Q6K", "ReadQ6K"),
    _T.IQ4_NL: Form("IQ4NL", "ReadIQ4NL", registers=255),
    _T.IQ4_XS: Form("IQ4XS", "ReadIQ4XS", registers=255),
    _T.IQ3_S: Form("Iq3<true>", "ReadIQ3S", registers=168, n_threads=8),
    _T.IQ3_XXS: Form("Iq3<false>", "ReadIQ3XXS", registers=168, n_threads=8),
    _T.IQ2_S: Form("Iq2<true>", "ReadIQ2S", registers=96, n_threads=16),
    _T.IQ2_XS: Form("Iq2<false>", "ReadIQ2XS", registers=96, n_threads=16),
    _T.IQ2_XXS: Form("Iq2Xxs", "ReadIQ2XXS", registers=168, n_threads=8),
}


@dataclass(frozen=True)
class Key:
    """A kernel of gpu.cu, for a type where it is one of a type."""

    kernel: Literal["find_largest", "find_mean_squares", "quantize", "dequantize"]
    tensor_type: GGMLQuantizationType | None = None
    is_weighted: bool = False

    @property
    def definitions(self) -> list[str]:
        """What gpu.cu is told."""
        if self.tensor_type is None:
            return []
        form = FORMS[self.tensor_type]
        if self.kernel == "dequantize":
            return [f"READER={form.reader}"]
        name = "QUANTIZER" if entries_shape(self.tensor_type) is None else "FITTED"
        return [f"{name}={form.struct}", f"WITH_IMPORTANCE={int(self.is_weighted)}"]

    @property
    def registers(self) -> int:
        """The most registers of a thread."""
        if self.tensor_type is None or self.kernel != "quantize":
            return 64
        return FORMS[self.tensor_type].registers
