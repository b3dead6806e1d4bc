/** CURVE against a real broker: keys, roles, namespaces, and a key that is taken back. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { connect, PermissionDeniedError, UnauthenticatedError, type SnapshotEvent } from "../src/index.js";
import { Daemon } from "./daemon.js";
import { snapbrokerd } from "./places.js";

/** A port of the loopback that nobody listens on. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

test("a remote client does what its key allows, and no more once it is revoked", async () => {
  const keys = mkdtempSync(join(tmpdir(), "snb-ts-access-"));
  const manage = (...words: string[]) => execFileSync(snapbrokerd(), ["keys", ...words, "--directory", keys]);
  const [router, publisher] = [await freePort(), await freePort()].map((port) => `tcp://127.0.0.1:${port}`);
  const tcp = `[tcp]\nendpoint = "${router ?? ""}"\nevents_endpoint = "${publisher ?? ""}"\nkeys = "${keys}"\n`;
  const daemon = new Daemon(["memory"], `${tcp}[publisher]\nheartbeat_ms = 200\n`);
  try {
    manage("new", "farm", "--role", "write", "--namespace", "red");
    await daemon.start();
    const clientKey = join(keys, "farm.key");
    await using broker = await connect({ endpoint: router, clientKey, snapshotter: "memory", namespace: "red" });
    await using local = await daemon.client("memory", { namespace: "blue" });
    const mirror = broker.mirror();
    const events: SnapshotEvent[] = [];
    const followed = (async () => {
      for await (const change of mirror) {
        if (change.type === "changed") events.push(change.event);
        if (mirror.snapshots.has("end")) break;
      }
    })();
    for (let index = 0; index < 20; index++) {
      await local.prepare(`hidden-${index}`);
      await broker.prepare(`k${index}`);
    }
    const denied = await broker
      .snapshotter("memory", "blue")
      .stat("hidden-0")
      .catch((error: unknown) => error);
    assert(denied instanceof PermissionDeniedError, String(denied));
    assert.equal(denied.details["namespace"], "blue");
    await broker.prepare("end");
    await followed;
    assert.equal(mirror.snapshots.size, 21);
    assert(events.every(({ namespace }) => namespace === "red"));

    manage("revoke", "farm");
    for (;;) {
      const answer = await broker.stat("end").catch((error: unknown) => error);
      if (answer instanceof Error) {
        assert(answer instanceof UnauthenticatedError, String(answer));
        break;
      }
    }
  } finally {
    await daemon.remove();
    rmSync(keys, { recursive: true });
  }
});
