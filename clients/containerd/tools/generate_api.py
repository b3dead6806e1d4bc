"""Writes the Python modules of `snapbroker_containerd.api` from its .proto files; with `--check` only compares them."""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import tempfile
from pathlib import Path
from typing import Final

from grpc_tools import protoc

SOURCE: Final = Path(__file__).resolve().parents[1] / "src"
API: Final = SOURCE / "snapbroker_containerd" / "api"
SUFFIXES: Final = ("_pb2.py", "_pb2.pyi")


def generate(target: Path) -> None:
    """Let protoc write the modules below `target`."""
    included = importlib.resources.files("grpc_tools") / "_proto"
    definitions = [str(path.relative_to(SOURCE)) for path in sorted(API.glob("*.proto"))]
    command = ["protoc", f"-I{SOURCE}", f"-I{included}", f"--python_out={target}", f"--pyi_out={target}", *definitions]
    status = protoc.main(command)
    if status:
        raise SystemExit(status)


def modules(top: Path) -> dict[str, str]:
    """The generated modules below `top`, by file name."""
    folder = top / API.relative_to(SOURCE)
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)}


def main() -> int:
    """Write, or compare; answers the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; status 1 when they differ")
    if not parser.parse_args().check:
        generate(SOURCE)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        differ = modules(Path(directory)) != modules(SOURCE)
    if differ:
        sys.stderr.write(f"{API} is not what its definitions generate: run {Path(__file__).name} without --check\n")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
