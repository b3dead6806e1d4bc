"""`make demo` as a user runs it: as root, as nobody, without any right to mount, interrupted, and killed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from benchmarks import demo
from tests.harness import survivors

ROOT: Final = Path(__file__).parent.parent
DEMO: Final = ROOT / "benchmarks" / "demo.py"
pytestmark = pytest.mark.timeout(300)
DEMO_S: Final = 240
"""How long the demo may take with few clones, on a busy machine."""
GONE_S: Final = 15
"""How long what was made may outlive the demo when that was killed."""
NOBODY: Final = "65534"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a disk that everybody may write to; what a killed demo left in it is deleted."""
    path = Path(tempfile.mkdtemp(prefix="snb-demo-", dir="/var/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def command(place: Path, *options: str) -> list[str]:
    return [sys.executable, str(DEMO), "--directory", str(place), "--clones", "12", *options]


def document(arguments: Sequence[str]) -> dict[str, Any]:
    """What a demo with --json prints; it must succeed and print nothing else."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=DEMO_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_report(report: dict[str, Any], clones: int, *, shell: bool) -> None:
    """Counts, tree and events of one backend fit together."""
    worked = report["worked_in"]
    assert report["clones"] == clones
    assert worked == min(clones, demo.MOUNTED)
    kinds = [each["kind"] for each in report["tree"]]
    assert kinds.count("committed") == 1 + worked + shell
    assert kinds.count("active") == clones - worked
    assert all(each["parent"] == ("" if each["name"] == "base" else "base") for each in report["tree"])
    events = report["events"]
    assert events["equal"] is True
    assert events["live"] == events["replayed"]
    assert events["live"]["prepare"] == 1 + clones + shell
    assert events["live"]["commit"] == 1 + worked + shell
    assert events["live"]["remove"] == len(report["tree"])
    assert events["live"]["cleanup"] == 1
    assert report["usage"]["base"]["inodes"] > demo.FILES_MIN
    assert 0 < report["usage"]["built"]["inodes"] < 10
    assert all(seconds > 0 for seconds in report["seconds"].values())


def left_of(place: Path) -> list[str]:
    """Mounts and loop devices that have to do with `place`, seen from here."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(place) in line]
    backing = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return mounts + [file for file in backing if str(place) in file]


@pytest.mark.root
@pytest.mark.slow
def test_as_root_every_backend_shows_all_of_it(place: Path) -> None:
    found = document(command(place, "--json"))
    assert found["rights"] == "root"
    assert found["left_out"] == {}
    assert set(found["snapshotters"]) == {"overlayfs", "native", "btrfs"}
    for name, report in found["snapshotters"].items():
        check_report(report, demo.NATIVE_CLONES if name == "native" else 12, shell=True)
    assert found["tree"]["files"] >= demo.FILES_MIN
    assert list(place.iterdir()) == []
    assert left_of(place) == []


@pytest.mark.root
@pytest.mark.slow
def test_as_nobody_in_a_user_namespace(place: Path) -> None:
    found = document(["unshare", "--mount", "sh", "-euc", as_nobody(), "sh", *command(place, "--json")])
    assert found["rights"] == "user_namespace"
    assert "root" in found["left_out"].pop("btrfs")
    assert found["left_out"] == {}
    check_report(found["snapshotters"]["overlayfs"], 12, shell=True)
    check_report(found["snapshotters"]["native"], demo.NATIVE_CLONES, shell=True)
    assert list(place.iterdir()) == []


@pytest.mark.root
@pytest.mark.slow
def test_without_the_right_to_mount_native_is_worked_on_in_place(place: Path) -> None:
    """In a user namespace without capabilities, in which no further one may be made."""
    script = (
        "echo 0 >/proc/sys/user/max_user_namespaces\n"
        'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"'
    )
    found = document(["unshare", "--user", "--map-root-user", "sh", "-euc", script, "sh", *command(place, "--json")])
    assert found["rights"] == "none"
    assert set(found["left_out"]) == {"btrfs", "overlayfs"}
    check_report(found["snapshotters"]["native"], demo.NATIVE_CLONES, shell=False)
    assert list(place.iterdir()) == []


def as_nobody() -> str:
    """A script that becomes nobody, in a mount namespace of its own.

    The interpreter and the repository may lie in a home that only its owner enters: what is in the way is
    covered by an empty filesystem that everybody enters, and both are bound to their places in it.
    """
    needed = sorted({sys.base_prefix, str(ROOT)})
    blocked = sorted({parent for path in needed for parent in map(str, Path(path).parents) if not _open_to_all(parent)})
    script = ["mount --make-rprivate /", "hold=$(mktemp -d)", "mount -t tmpfs none $hold"]
    for number, path in enumerate(needed):
        script += [f"mkdir $hold/{number}", f"mount --rbind {shlex.quote(path)} $hold/{number}"]
    for path in blocked:
        # One that lies in another is gone already.
        script.append(f"if [ -d {shlex.quote(path)} ]; then mount -t tmpfs -o mode=755 none {shlex.quote(path)}; fi")
    for number, path in enumerate(needed):
        script += [f"mkdir -p {shlex.quote(path)}", f"mount --rbind $hold/{number} {shlex.quote(path)}"]
    script.append(f'exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "$@"')
    return "\n".join(script)


def _open_to_all(path: str) -> bool:
    return bool(os.stat(path).st_mode & 0o001)


def start(place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def read_until(process: subprocess.Popen[str], words: str) -> None:
    """Read what is printed up to a line with these words."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"never printed {words!r}: {seen} {process.communicate()[1]}")


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("the work:", signal.SIGINT),
        ("overlayfs:", signal.SIGTERM),
        ("mount 10", signal.SIGINT),
        ("remove", signal.SIGHUP),
        ("native:", signal.SIGTERM),
    ],
)
def test_interrupted_it_cleans_up(place: Path, words: str, number: signal.Signals) -> None:
    process = start(place)
    try:
        read_until(process, words)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=DEMO_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (128 + number, 128 + signal.SIGINT), complaint
    assert complaint == "demo: interrupted; what was made is gone again\n"
    assert_gone(place, family)
    assert list(place.iterdir()) == []


def test_a_second_signal_does_not_cut_off_the_putting_away() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        interrupts = demo.Interrupts()
        with pytest.raises(demo.Interrupted):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(demo.Interrupted) as caught, interrupts.deferred():
            signal.raise_signal(signal.SIGHUP)
        assert caught.value.status == 128 + signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.root
def test_killed_it_leaves_a_directory_and_nothing_else(place: Path) -> None:
    process = start(place)
    try:
        read_until(process, "mount 10")
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        assert any(str(place) in line for line in left_of(place)), "the loop device is seen from here"
    finally:
        process.kill()
        process.communicate()
    assert_gone(place, family)


def assert_gone(place: Path, family: Sequence[psutil.Process]) -> None:
    """Wait until the processes have ended, and what the kernel then takes away is gone."""
    assert survivors(family, GONE_S) == []
    give_up = time.monotonic() + GONE_S
    pace = threading.Event()
    while left_of(place):
        assert time.monotonic() < give_up, left_of(place)
        pace.wait(0.02)


def test_a_tree_is_made_of_whole_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FILES_MIN", 5)
    monkeypatch.setattr(demo, "FILES_MAX", 8)
    for name, files in (("a", 3), ("b", 20), ("c", 2), ("d", 4)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for number in range(files):
            (tmp_path / name / "deep" / str(number)).write_text("1234")
    (tmp_path / "aa").symlink_to("a")
    monkeypatch.setattr(demo, "TREES", (str(tmp_path / "missing"), str(tmp_path / "c"), str(tmp_path)))
    found = demo.choose_tree()
    assert (found.directory, found.entries, found.of) == (str(tmp_path), ("a", "aa", "c"), 5)
    assert (found.files, found.bytes) == (6, 5 * 4 + 1)


def test_a_machine_without_a_tree_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TREES", (str(tmp_path),))
    with pytest.raises(demo.DemoError, match="5,000 files"):
        demo.choose_tree()


def test_a_directory_that_is_missing_is_one_line_and_status_1() -> None:
    done = subprocess.run(
        [sys.executable, DEMO, "--directory", "/no/such/place"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "/no/such/place" in done.stderr
