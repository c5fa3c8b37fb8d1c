"""Cards and hashes of a bundle, and the way from a bundle to the Hub.

`push.py` goes that way: `bundle_folders` opens and checks the bundle; `admission` says who may
write, and which files of an earlier push go; `staging` makes what each repository is to hold, with
`split` for parts and `card`, `front_matter` and `modelfile` for texts; `upload` sends it, `pace`
tells how far; `readback` compares. `remote` is what the Hub holds and what its refusals mean,
`dry_run` the same way without a step that writes.
"""
