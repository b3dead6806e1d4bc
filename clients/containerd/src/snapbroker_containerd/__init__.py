"""containerd's proxy snapshotter: gRPC on one side, one more client of the snapshot broker on the other."""
