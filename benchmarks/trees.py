"""Directory trees that look like somebody's work: the same bytes every time, from one seed."""

from __future__ import annotations

import os
import random
from pathlib import Path

SEED = 20_240_229
FILES_PER_DIRECTORY = 40
LINKS_EVERY = 25
"""One file in so many is a symbolic link or a second name of its neighbour."""
CHUNK_BYTES = 8 << 20


def many(path: Path, files: int, size_bytes: int) -> None:
    """Write `files` files of very different sizes, `size_bytes` altogether or a little less, with some links."""
    chance = random.Random(SEED)
    weights = [chance.lognormvariate(0, 1.6) for _ in range(files)]
    scale = size_bytes / sum(weights)
    content = chance.randbytes(CHUNK_BYTES)
    directory, last = path, None
    for number, weight in enumerate(weights):
        if number % FILES_PER_DIRECTORY == 0:
            directory = path / f"part-{number // 1000}" / f"directory-{number}"
            directory.mkdir(parents=True)
        name = directory / f"file-{number}"
        if last and number % LINKS_EVERY == 0:
            if number % 2:
                name.hardlink_to(last)
            else:
                name.symlink_to(os.path.relpath(last, directory))
            continue
        left = int(weight * scale)
        with name.open("wb") as file:
            while left > 0:
                left -= file.write(content[: min(left, CHUNK_BYTES)])
        last = name


def large(path: Path, size_bytes: int) -> None:
    """Write files of 8 MiB, `size_bytes` altogether."""
    content = random.Random(SEED).randbytes(CHUNK_BYTES)
    for number in range(size_bytes // CHUNK_BYTES):
        (path / f"large-{number}").write_bytes(content)


def empty(path: Path, files: int) -> None:
    """Make `files` empty files, 1,000 to a directory."""
    directory = path
    for number in range(files):
        if number % 1000 == 0:
            directory = path / f"directory-{number}"
            directory.mkdir()
        os.close(os.open(directory / f"file-{number}", os.O_CREAT | os.O_WRONLY, 0o644))
