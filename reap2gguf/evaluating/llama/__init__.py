"""What llama.cpp itself says of GGUF files: logits, likelihoods, speed, and first answers."""
