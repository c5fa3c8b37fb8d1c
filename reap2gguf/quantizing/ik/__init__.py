"""ik_llama.cpp's library, in processes of its own: two libggml cannot share one."""
