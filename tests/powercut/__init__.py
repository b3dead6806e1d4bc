"""Power cuts: a load on a filesystem of its own, cut at a random moment, brought up again and held against the books."""
