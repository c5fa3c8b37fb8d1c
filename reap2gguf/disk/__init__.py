"""Writing and hashing large files at the speed of the disk."""
