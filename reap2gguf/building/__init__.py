"""A build: its plan, its stages in order, its folders and its record."""
