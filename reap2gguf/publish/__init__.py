"""The cards and hashes that make a folder ready to upload."""
