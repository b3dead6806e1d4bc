"""Programs that call: each runs one load and prints one JSON document."""
