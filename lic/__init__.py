"""lic: learned image compression, its pruning by search, and its quantization, from scratch."""
