"""Calibration data becomes rows of token ids, in this order:

    spec            the SPEC of --calibration: which components, and how many rows of each
    mixes           the SPECs that have names
    scanned_files   local files, each checked and hashed once   } the records (json_records: of
    hub_datasets    datasets on the Hub, streamed               } lines or arrays)
    layouts         records become samples (conversations, tool_calls: the messages in them)
    samples         samples become texts; those that cannot be used are counted
    sources         what a local component holds, as passages
    rows            passages become rows and chunks of token ids (stretches: of a text that is far
                    longer than they need)
    drawing         rows are drawn from all components

A *record* is one entry of a JSON or Parquet file, or of a dataset on the Hub, as it is stored.
A *sample* is what the model reads of a record: one text, or one conversation with its tools.
A *passage* is a text (a sample, or a text file) and the rule by which it is cut.
A *row* is one sequence of at most --max-length token ids, which the observation reads.
A *chunk* is one sequence of exactly --chunk token ids, which the importance matrix reads.
"""
