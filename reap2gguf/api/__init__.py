"""The library: Python functions that do what the commands do.

`build` does everything; the functions of `stages.py`, `pruning.py` and `quantizing.py` are its
stages, one at a time. Each takes a MODEL as the command line does: a local folder, or
`owner/name[@revision]` on the Hub. With `follow_links` the weights of a folder (*.safetensors) may
be links to any place. Errors are Reap2ggufErrors, with the message that the command line would
print. Long work calls `progress`, if one is given, with a `ProgressEvent` now and then.

torch and transformers are loaded inside the functions that compute.
"""
