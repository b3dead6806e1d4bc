"""A process ended at every named point, on every backend, and what is left held against the clients' books."""
