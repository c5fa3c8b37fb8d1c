"""Writes GGUF files: header and tokenizer, then every tensor in one pass over the checkpoint.

model_files     the files of a model: one for each recipe, and side files
header_facts    what a header says; general: its keys about source and sampling
header          the header itself, and where each tensor lies
gguf_export     all tensors in one pass, into all files
row_ranges      what is read and quantized at a time; verification makes the same bytes with it
device_blocks   the same on a GPU
awaited         importance that is still being computed
journal         what an interrupted export has written
quantizers      the line that says what quantizes
file_size       how large a file will be; memory: what writing it takes
"""
