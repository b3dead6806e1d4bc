"""How snapshots lie on disk: one module a backend, found through the entry points `snapbroker.backends`."""
