"""GGUF files, llama.cpp's format of models: read by its own package, `gguf` (the extra `gguf`)."""
