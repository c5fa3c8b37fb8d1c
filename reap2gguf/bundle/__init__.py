"""What a build leaves behind: two folders, their manifest, cards and hashes."""
