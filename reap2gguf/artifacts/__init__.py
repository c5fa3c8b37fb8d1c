"""The files that stages share: tokenized texts and observations."""
