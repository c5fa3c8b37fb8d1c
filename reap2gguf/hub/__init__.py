"""Models on the Hub: what a repository holds, its weights by ranges and files, errors and retries."""
