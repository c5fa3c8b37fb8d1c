"""GGUF as a file format: headers read and written, files cut and joined, importance matrices."""
