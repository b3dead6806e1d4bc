"""containerd's public snapshots API: the definitions, and the code that `tools/generate_api.py` makes of them."""
