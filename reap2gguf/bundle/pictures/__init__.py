"""The pictures of a card, drawn with matplotlib from manifest and observations."""
