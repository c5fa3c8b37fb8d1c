"""Numbers by which memory is divided; `plan` needs them without loading torch."""

MIB = 2**20
# Larger batches are no faster: every expert's share fills the machine.
MOST_TOKENS = {"cpu": 8192, "cuda": 32768}
CONTEXT_BYTES = 640 * MIB  # what CUDA and its libraries take of a GPU beside all tensors
# Of a position on its way through a layer's attention, in hidden sizes; bench/RESULTS.md.
ATTENTION_WIDTHS = 32
REFERENCE_DELTANET_WIDTHS = 64  # all in float32
