"""Power cuts: a filesystem under load is cut at a random moment, brought up again and held against the books."""
