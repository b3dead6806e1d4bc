"""snapbroker and containerd side by side: what each does a second, and how long one call takes."""
