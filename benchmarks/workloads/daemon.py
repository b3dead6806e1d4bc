"""What the daemons cost beside their calls: memory at rest, and events to many subscribers."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import BASE, Bench
from benchmarks.figures import Figure, Target, compare
from benchmarks.plan import BACKENDS
from benchmarks.services import OURS, Sample, load

RESIDENT_MIB_MAX = 60.0
CALLERS = 8


def memory(bench: Bench) -> Iterator[Figure]:
    """Resident memory of every process, fresh and after some work."""
    for side in bench.sides:
        for backend in BACKENDS:
            bench.say(f"memory of {side}, {backend}")
            with bench.service(side, backend, with_base=True) as service:
                states = {"idle": service.resident()}
                options = {"callers": CALLERS, "operations": bench.plan.worked, "parent": BASE, "prefix": "worked"}
                load(service, "prepare", **options)
                load(service, "drop", **options)
                service.settle()
                states["idle again after work"] = service.resident()
            for state, processes in states.items():
                for process, resident in processes.items():
                    # Helpers end when they have rested for a while: they are told, and not asked anything.
                    judged = side == OURS and process != "helpers"
                    yield Figure(
                        f"memory of {process}", backend, state, "MiB", (resident / 2**20,), subject=side, baseline="",
                        target=Target(at_most=RESIDENT_MIB_MAX, absolute=True) if judged else None,
                    )  # fmt: skip


def fanout(bench: Bench) -> Iterator[Figure]:
    """Prepare while 1, 10 or 100 subscribers hear of it."""
    for count in bench.plan.subscribers:
        bench.say(f"events to {count} subscribers")

        def measure(side: str, count: int = count) -> Sample:
            with bench.service(side, "overlayfs", with_base=True) as service:
                return load(
                    service, "fanout", callers=CALLERS, subscribers=count, operations=bench.plan.fanout_events,
                    parent=BASE, prefix="event",
                )  # fmt: skip

        samples = bench.alternate(measure)
        at = f"{count} subscriber{'s' * (count > 1)}, {CALLERS} callers"
        for side, taken in samples.items():
            if lost := sum(sample.lost for sample in taken):
                bench.say(f"{side}: {lost} of the deliveries were lost on the socket")
        yield compare("events delivered", "overlayfs", at, samples, unit="events/s", take="delivery_rate")
        yield compare("prepare while subscribers listen", "overlayfs", at, samples)
