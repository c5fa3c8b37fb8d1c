"""Reading and writing Hugging Face checkpoints: headers first, tensors on demand.

entries             what lies in a folder, before anything is opened
mistaken            what a folder is that is no checkpoint
config              bounded reads of JSON files
index               which file has which tensor
safetensors_header  the header of a file
weights             how weights are read, wherever they come from
tensor_files        those of safetensors files, as they are stored
checkpoint          a whole folder; quantized/ decodes its weights
companions          the small files beside the weights
writer              shards and their index; shard_writer: with several threads
"""
