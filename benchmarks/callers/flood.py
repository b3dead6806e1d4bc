"""A client that floods: keeps many requests open whatever it is answered, never waits, never backs off.

It says `ready` when the first reply is there and goes on until the end of its standard input; then it prints how many
calls were answered, and how many requests refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import select
import sys
import time

import zmq

from snapbroker.protocol import DONE, REQUEST_VERSION, Call, Prepare, Request, Stat, decode_reply, encode


def calls(operation: str, prefix: str, parent: str, count: int) -> tuple[Call, ...]:
    """The calls of one request; what creates has a name of its own every time."""
    if operation == "stat":
        return tuple(Stat(key=f"{prefix}-0") for _ in range(count))
    return tuple(Prepare(key=f"{prefix}-{next(_numbers)}", parent=parent) for _ in range(count))


_numbers = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-address", required=True)
    parser.add_argument("-namespace", default="bench")
    parser.add_argument("-snapshotter", default="overlayfs")
    parser.add_argument("-operation", default="stat", choices=("stat", "prepare"))
    parser.add_argument("-prefix", default="flood")
    parser.add_argument("-parent", default="")
    parser.add_argument("-requests", type=int, default=1000, help="how many are open")
    parser.add_argument("-calls", type=int, default=1, help="how many calls are in each")
    options = parser.parse_args()
    answered = refused = 0
    begun = time.monotonic()
    numbers = itertools.count()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 2 * options.requests
        socket.connect(options.address)

        def send() -> None:
            request = Request(
                calls=calls(options.operation, options.prefix, options.parent, options.calls),
                namespace=options.namespace,
            )
            body = encode(request)
            socket.send_multipart((REQUEST_VERSION, b"%d" % next(numbers), options.snapshotter.encode(), body))

        for _ in range(options.requests):
            send()
        told = False
        while not (select.select((sys.stdin,), (), (), 0)[0] and not os.read(sys.stdin.fileno(), 4096)):
            socket.poll(100)
            for _ in range(256):
                try:
                    _, _, status, body = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if status != DONE:
                    continue
                if not told:
                    print("ready", flush=True)
                    told = True
                if decode_reply(body).error is None:
                    answered += options.calls
                else:
                    refused += 1
                send()
    seconds = time.monotonic() - begun
    print(json.dumps({"rate": answered / seconds, "refused": refused, "seconds": seconds}))


if __name__ == "__main__":
    main()
