"""From observations to kept experts, and from a checkpoint to a smaller one."""
