"""The table of fail points is true, what arms them does what it says, and a broker that is careless is found out."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from backends import failpoints
from backends.failpoints import ACTOR, NAMES, POINTS, VARIABLE, reach
from tests.failpoints.crashes import Armory, running
from tests.failpoints.ways import WAYS, combinations, way_of
from tests.harness import Daemon

ROOT: Final = Path(__file__).parent.parent.parent
PAGE: Final = ROOT / "docs" / "ARCHITECTURE.md"
POINT: Final = "writer.begun"
OTHER: Final = "writer.settled"

_REACH: Final = re.compile(r'\breach\("([^"]+)"\)')


def table() -> str:
    """The table of the page: what a crash leaves, and at which points."""
    rows: dict[str, list[str]] = {}
    for point in POINTS:
        rows.setdefault(point.leaves, []).append(f"`{point.name}`")
    lines = ["| what a crash leaves | at |", "|---|---|"]
    return "\n".join([*lines, *(f"| {leaves} | {', '.join(names)} |" for leaves, names in rows.items())]) + "\n"


class TestTable:
    def test_every_point_is_reached_by_the_module_that_it_is_named_after(self) -> None:
        reached = {
            (path.stem, name)
            for room in ("broker", "backends")
            for path in (ROOT / room).rglob("*.py")
            for name in _REACH.findall(path.read_text())
        }
        assert {name for _, name in reached} == NAMES
        assert {(module, name) for module, name in reached if name.partition(".")[0] != module} == set()

    def test_names_are_unique(self) -> None:
        assert len(NAMES) == len(POINTS)

    def test_every_point_is_tried(self) -> None:
        tried = {name for backend in ("overlayfs", "native", "btrfs") for name, _ in combinations(backend)}
        assert tried | {name for name in NAMES if way_of(name).at == "first"} == NAMES
        assert WAYS.keys() <= NAMES

    def test_the_page_has_the_table(self) -> None:
        assert table() in PAGE.read_text(), f"{PAGE.name} needs this table:\n{table()}"


class TestArming:
    @pytest.fixture
    def armory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Armory]:
        """This process looks at the points, as an actor."""
        armory = Armory(tmp_path / "armory")
        monkeypatch.setenv(VARIABLE, str(armory.place))
        failpoints.arm(ACTOR)
        yield armory
        monkeypatch.delenv(VARIABLE)
        failpoints.arm(ACTOR)

    def test_nothing_happens_where_nothing_is_armed(self, armory: Armory) -> None:
        armory.arm(OTHER, "error:EIO")
        reach(POINT)
        assert not armory.struck(POINT)

    def test_an_error_lasts_as_long_as_its_file(self, armory: Armory) -> None:
        armory.arm(POINT, "error:ENOSPC")
        for _ in range(2):
            with pytest.raises(OSError, match=POINT) as raised:
                reach(POINT)
            assert raised.value.errno == errno.ENOSPC
        armory.clear()
        reach(POINT)

    def test_the_nth_time(self, armory: Armory) -> None:
        armory.arm(POINT, "error:EIO@3")
        reach(POINT)
        reach(POINT)
        with pytest.raises(OSError, match=POINT):
            reach(POINT)

    def test_armed_again_it_counts_from_the_beginning(self, armory: Armory) -> None:
        armory.arm(POINT, "error:EIO@2")
        reach(POINT)
        armory.arm(POINT, "error:EIO@2")
        reach(POINT)
        with pytest.raises(OSError, match=POINT):
            reach(POINT)

    def test_in_another_process_only(self, armory: Armory) -> None:
        armory.arm(POINT, "error:EIO hand")
        reach(POINT)
        armory.arm(POINT, "error:EIO actor")
        with pytest.raises(OSError, match=POINT):
            reach(POINT)

    def test_a_note_tells_who_came(self, armory: Armory) -> None:
        armory.arm(POINT, "note")
        reach(POINT)
        assert armory.struck_by(POINT) == str(os.getpid())

    def test_a_pause_ends_with_its_file(self, armory: Armory) -> None:
        armory.arm(POINT, "pause")
        passed = threading.Event()
        thread = threading.Thread(target=lambda: (reach(POINT), passed.set()))
        thread.start()
        while not armory.struck(POINT):
            assert thread.is_alive()
        assert not passed.is_set()
        armory.clear()
        assert passed.wait(20)
        thread.join()

    def test_of_two_processes_one_is_killed_and_the_next_goes_on(self, armory: Armory) -> None:
        program = f"from backends import failpoints as f; f.arm(f.ACTOR); f.reach({POINT!r}); print('alive')"
        armory.arm(POINT, "kill")
        runs = [
            subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        ends = sorted((run.communicate()[0], run.returncode) for run in runs)
        assert ends == [("", -signal.SIGKILL), ("alive\n", 0)]
        assert armory.struck(POINT)


class TestDaemon:
    @pytest.mark.parametrize(
        ("name", "text", "told"),
        [
            ("", "", "not a directory"),
            ("typo", "kill", "no fail point 'typo'"),
            (POINT, "explode", "'explode' is not"),
            (POINT, "error:ENOTHING", "'error:ENOTHING' is not"),
            (POINT, "kill@0", "'kill@0' is not"),
            (POINT, "kill broker", "'kill broker' is not"),
        ],
    )
    def test_a_mistake_is_told(self, name: str, text: str, told: str, tmp_path: Path) -> None:
        place = tmp_path / "armory"
        if name:
            place.mkdir()
            (place / name).write_text(text)
        ended = subprocess.run(
            [Path(sys.executable).with_name("snapbrokerd"), "--root", tmp_path, "--runtime", tmp_path],
            env={**os.environ, VARIABLE: str(place)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2
        assert VARIABLE in ended.stderr
        assert told in ended.stderr

    def test_a_daemon_with_fail_points_says_so(self, tmp_path: Path) -> None:
        with Daemon({"memory": {}}, environment={VARIABLE: str(tmp_path)}) as daemon:
            assert "FAIL POINTS ARE ARMED" in daemon.log()
        with Daemon({"memory": {}}) as daemon:
            assert "FAIL POINTS" not in daemon.log()


CARELESS: Final = {
    "sweeps nothing": (
        "overlayfs.filled",
        "from broker.snapshotter.recovery import Recovery\nRecovery._sweep = lambda self: setattr(self, 'finished', 1)",
        "without a record",
    ),
    "keeps no outcome": (
        "environment.committed",
        "from broker.store.outcomes import Outcomes\nOutcomes.store = lambda *_: None",
        "the repeat was answered|AlreadyExists|NotFound",
    ),
    "writes no event": (
        "environment.committed",
        "from broker.store.journal import Turn\nTurn.append = lambda *_: None",
        "found \\[\\] of 0",
    ),
}


@pytest.mark.root
@pytest.mark.parametrize("how", CARELESS)
def test_a_careless_broker_is_found_out(how: str, tmp_path: Path) -> None:
    name, patch, told = CARELESS[how]
    (tmp_path / "sitecustomize.py").write_text(patch)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with running("overlayfs", "careless", {"PYTHONPATH": path}) as crashes, pytest.raises(AssertionError, match=told):
        crashes.round(name, ACTOR)
