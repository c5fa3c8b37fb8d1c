"""Which method of pruning is the best for a model: candidates are measured, and a rule chooses."""
