"""What the tensors of a checkpoint mean: one file per architecture, one literal table."""
