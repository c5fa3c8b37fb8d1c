"""Models on the Hub: listings, weights by ranges and by whole files, errors and retries.

source      what the user typed for MODEL -> a folder
opened      a model that was opened: source, tensors, and what its config and headers say
snapshot    one commit of a repository: its list of files, its small files in the cache
shards      its weights: headers by ranged reads, whole files when they are needed
ranges      parts of files, by ranged reads
gguf_file   a GGUF file: its header and tensors by ranged reads
download    progress, threads and partial files of downloads
retry       the one loop that repeats a request, for models, datasets and pushes
errors      what the errors of the Hub and of the network mean
"""
