"""Broken parts: each fault is made for real, and beside it somebody works who must not notice."""
