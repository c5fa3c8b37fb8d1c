"""Models on the Hub: listings, weights by ranges and by files, errors and retries."""
