"""One snapshotter: the verbs, decided against the store and done by a backend, in a process of its own."""
