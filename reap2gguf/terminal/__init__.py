"""What a person sees: progress, tables and the options of commands."""
