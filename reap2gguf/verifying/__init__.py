"""Reads both outputs back from disk and compares them with the plan, the source and each other.

report            what is wrong, how strictly each file was compared, what was not
context           what the checks of one bundle share

A bundle as a whole:

bundle            all checks of its two folders, in order
facts             what the manifest says twice; its parts choice, budget and protected
generated         cards and other small files, made again; differences: where they differ
against_source    with the model that was pruned; opening: as the user names it
changed           new weights of a repair or a merge; sliced: a GGUF file cut out of another
of_gguf           GGUF files alone, with the GGUF file that they were made from

The safetensors folder:

hf_folder         config, experts and routers; shards: how the files are written
folder_values     every byte

The GGUF folder:

gguf_part         members, hashes and files, in order
imatrix_files     the importance matrix
gguf_file         one file: gguf_layout, gguf_header, then its values
gguf_values       rows of all files against the weights, each range read once
comparison        one file against a range; matrices: how far it may be; device_comparison: on a GPU
alone             files with nothing to compare them with
exactness         which types are made again and compared byte for byte
memory            what that takes
"""
