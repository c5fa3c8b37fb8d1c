"""What a build needs of a machine: disk, memory and time, and whether this machine has it.

estimate.py   everything together, for `plan`
machine.py    what this machine has
speed.py      how fast it is, measured once and kept
sizes.py      sums over the tensors, each taken once
amount.py     how much text the calibration passes read
scoring.py    how much text is scored to measure quality
memory.py     batches, and where hidden states wait: the sweep's own decision
disk.py       final files, and what lies beside them while a build runs
seconds.py    the time of each stage; file_seconds.py: of writing and verifying files
reuse.py      which stages are done already
rented.py     usual rented GPUs
room.py       the check of a build that starts
"""
