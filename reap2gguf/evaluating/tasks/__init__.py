"""Questions of lm-eval's tasks, scored for all variants in one sweep: no model is in memory."""
