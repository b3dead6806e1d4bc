"""Actors: processes with a mailbox, started, watched and restarted; what they do inside is not known here."""
