"""Reading and writing Hugging Face checkpoints: headers first, tensors on demand."""
