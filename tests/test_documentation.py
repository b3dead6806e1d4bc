"""What the documents tell people to type is typed here, in their order, and must work; what they link to exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import pytest

ROOT: Final = Path(__file__).parent.parent
BIN: Final = Path(sys.executable).parent
PAGES: Final = ("README.md", "docs/guide.md", "docs/operations.md")
"""The pages whose examples are run."""
DOCUMENTS: Final = (
    *PAGES,
    "CHANGELOG.md",
    "clients/README.md",
    "clients/go/README.md",
    "clients/python/README.md",
    "clients/typescript/README.md",
    "clients/vectors/README.md",
    "docs/ARCHITECTURE.md",
    "docs/command.md",
    "docs/containerd.md",
    "docs/reliability.md",
    "docs/rfc/README.md",
    "docs/rfc/1-request.md",
    "docs/rfc/2-events.md",
    "docs/rfc/3-access.md",
    "tests/conformance/README.md",
)
FIGURES: Final = {"size_bytes", "map_bytes", "used_bytes", "retry_after_ms"}
"""What looks like a setting and is told by the status, or with an error."""
SESSION_S: Final = 100
"""How long one page's examples may take on a busy machine."""

_FENCE: Final = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Example:
    """A fenced block: its language and other words of its fence, where it stands, and its text."""

    words: tuple[str, ...]
    line: int
    text: str

    @property
    def as_shell(self) -> str:
        """The example as a shell runs it, telling its line first."""
        told = f"echo '--- line {self.line}'"
        if self.words[0] == "sh":
            return f"{told}\n{self.text}"
        return f"{told}\npython - <<'END OF EXAMPLE'\n{self.text}END OF EXAMPLE\n"


def examples(page: str) -> list[Example]:
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text()
    return [
        Example(tuple(found[1].split()), text.count("\n", 0, found.start()) + 2, found[2])
        for found in _FENCE.finditer(text)
    ]


def session(page: str) -> list[Example]:
    """The examples that belong together: those marked `sh` or `python` and nothing else."""
    return [example for example in examples(page) if example.words in (("sh",), ("python",))]


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory on a disk, with a path short enough for sockets; unmounted below and gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="snb-doc-", dir="/var/tmp"))
    yield path
    left = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(path) in line]
    for point in reversed([point for point in left if point.startswith(f"{path}/")]):
        subprocess.run(["umount", "--lazy", point], check=False)
    shutil.rmtree(path)


def run_session(page: str, place: Path) -> str:
    """Type a page's examples into one shell, end what it leaves running, and answer what was printed."""
    script = "set -euo pipefail\n" + "".join(example.as_shell for example in session(page))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SNAPBROKER_")}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    printed = place / "printed"
    with printed.open("w") as output:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
        )
    try:
        status: int | str = shell.wait(SESSION_S)
    except subprocess.TimeoutExpired:
        shell.kill()
        shell.wait()
        status = f"a timeout after {SESSION_S} s"
    left = _end(shell.pid)
    log = place / "log"
    told = f"{printed.read_text()}\n{log.read_text() if log.exists() else ''}"
    assert status == 0, f"{page} ended with {status} after:\n{told}"
    assert not left, f"{page} left processes running:\n{told}"
    return printed.read_text()


def _end(group: int) -> list[int]:
    """End what still runs of a process group, and answer what that was."""
    left = _members(group)
    if left:
        os.killpg(group, signal.SIGTERM)
        _, stubborn = psutil.wait_procs([psutil.Process(pid) for pid in _members(group)], timeout=5)
        for process in stubborn:
            process.kill()
    return left


def _members(group: int) -> list[int]:
    """The processes of a group, other than zombies."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.root
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_work_in_their_order(page: str, place: Path) -> None:
    printed = run_session(page, place)
    assert printed.count("--- line ") == len(session(page)) > 0
    assert "Traceback" not in (place / "log").read_text()


def test_every_fence_is_run_or_known() -> None:
    known = {("sh",), ("python",), ("sh", "install")}
    found = {example.words for page in PAGES for example in examples(page)}
    assert found <= known, "a fence that no test runs; indent what is not meant to be typed"


def test_the_readme_examples_are_short() -> None:
    python = [example.text for example in session("README.md") if example.words == ("python",)]
    assert len(python) == 3
    assert all(len(text.splitlines()) <= 12 for text in python)


@pytest.mark.slow
def test_the_install_commands_work(tmp_path: Path) -> None:
    """Without the network: dependencies and the build's own come from the environment of the tests."""
    (install,) = [example for example in examples("README.md") if example.words == ("sh", "install")]
    for name in ("clients", "broker", "backends"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": packages,
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", install.text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout.splitlines()[-2:] == [f"snapbrokerd {version}", f"snapbroker {version}"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in _LINK.findall(text) if not link.startswith(("http://", "https://"))]
    if document != "docs/ARCHITECTURE.md":
        assert links or document == "docs/command.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        # The plot is written by the benchmarks.
        assert target.exists() or target.name == "benchmarks.svg", f"{document}: {link}"
        if anchor:
            assert anchor in _anchors(target.read_text()), f"{document}: {link}"


def _anchors(text: str) -> set[str]:
    """What headings can be linked as."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    for target in set(re.findall(r"(?:`|^    )make ([a-z]+)", (ROOT / page).read_text(), re.MULTILINE)):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}: make {target}: {done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page: str) -> None:
    """Every `snapbroker VERB` and `snapbrokerd VERB` that the text mentions, beside the examples."""
    text = (ROOT / page).read_text()
    for program, known in (("snapbroker", _verbs("snapbroker")), ("snapbrokerd", _verbs("snapbrokerd"))):
        for line in re.findall(rf"`{program} ([^`\n]+)`", text):
            verbs = [word for word in shlex.split(line) if not word.startswith("-") and word.islower()]
            assert not verbs or verbs[0] in known, f"{page}: {program} {line}"


def _verbs(program: str) -> set[str]:
    helped = subprocess.run([BIN / program, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^    ([a-z][a-z-]*) ", helped, re.MULTILINE))


def test_settings_named_in_operations_exist() -> None:
    """A setting in back quotes that looks like one (`..._max`, `..._ms` and so on) is in the shipped configuration."""
    text = (ROOT / "docs/operations.md").read_text()
    configuration = (ROOT / "config/snapbrokerd.toml").read_text()
    settings = set(re.findall(r"`([a-z_]+_(?:max|min|ms|s|bytes|mode|level|format))`", text)) - FIGURES
    assert settings
    for setting in settings:
        assert re.search(rf"^# {setting} = ", configuration, re.MULTILINE), setting
