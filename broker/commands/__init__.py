"""The commands of `snapbrokerd` that work on a root instead of serving it, a module for each group."""
