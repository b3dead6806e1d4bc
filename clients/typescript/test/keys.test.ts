/** Key files, and CURVE against a server that the test plays. */

import assert from "node:assert/strict";
import { chmodSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { curveKeyPair, Reply } from "zeromq";

import {
  connect,
  InvalidArgumentError,
  SnapbrokerError,
  UnauthenticatedError,
  UnavailableError,
  type ConnectOptions,
} from "../src/index.js";
import { isKey, keysFor, parseKeyFile, publicOf } from "../src/keys.js";
import { FakeBroker } from "./fake.js";

const directory = mkdtempSync(join(tmpdir(), "snb-ts-keys-"));
const PUBLIC = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID";
const SECRET = "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs";
const SERVER = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7";
const TCP = "tcp://127.0.0.1:1";

function file(name: string, content: string, mode = 0o600): string {
  const path = join(directory, name);
  writeFileSync(path, content);
  chmodSync(path, mode);
  return path;
}

function keyFile(name: string, publicKey: string, secretKey: string, serverKey = ""): string {
  const server = serverKey && `server_key = "${serverKey}"\n`;
  return file(name, `public_key = "${publicKey}"\nsecret_key = "${secretKey}"\n${server}`);
}

after(() => {
  rmSync(directory, { recursive: true });
});

describe("a key file", () => {
  test("is read as the specification has it", () => {
    const content = `# whoever has it is build-farm # twice\r\n\r\n \tname\t= "build-farm" # who\nsecret_key="${SECRET}"#\n other = ""`;
    assert.deepEqual(
      [...parseKeyFile(content, "f")],
      [
        ["name", "build-farm"],
        ["secret_key", SECRET],
        ["other", ""],
      ],
    );
    assert.deepEqual([...parseKeyFile('a = "x#y" # z', "f")], [["a", "x#y"]]);
  });

  for (const line of [
    'a = "b',
    "a = b",
    'a = "b" c',
    '= "b"',
    'a b = "c"',
    'a = "b\\"',
    "a = 'b'",
    'é = "b"',
    'a = "b"\na = "c"',
  ]) {
    test(`with ${JSON.stringify(line)} is refused without its content`, () => {
      assert.throws(() => parseKeyFile(line, "the-file"), {
        name: "InvalidArgumentError",
        message: /^the-file, line \d: /,
      });
    });
  }

  test("is the client's, with the server's key from wherever it was told", async () => {
    const own = keyFile("own", PUBLIC, SECRET, SERVER);
    const bare = keyFile("bare", PUBLIC, SECRET);
    const pub = file("server.pub", `public_key = "${PUBLIC}"\n`, 0o644);
    const keys = { publicKey: PUBLIC, secretKey: SECRET };
    assert.deepEqual(await keysFor(TCP, own), { ...keys, serverKey: SERVER });
    assert.deepEqual(await keysFor(TCP, own, pub), { ...keys, serverKey: PUBLIC });
    assert.deepEqual(await keysFor(TCP, bare, SERVER), { ...keys, serverKey: SERVER });
    const link = join(directory, "link");
    symlinkSync(own, link);
    assert.deepEqual(await keysFor(TCP, link), { ...keys, serverKey: SERVER });
    assert.equal(await keysFor("ipc:///x", join(directory, "not-there")), undefined);
    assert.equal(await keysFor(TCP), undefined);
  });

  test("that is not in order is refused with its name", async () => {
    const wrong: [RegExp, string, string?][] = [
      [/cannot be read/, join(directory, "not-there")],
      [/not a regular file/, directory],
      [
        /chmod 600/,
        file("open", `public_key = "${PUBLIC}"\nsecret_key = "${SECRET}"\nserver_key = "${SERVER}"`, 0o640),
      ],
      [/no secret_key/, file("half", `public_key = "${PUBLIC}"`)],
      [/public_key is not a key/, keyFile("short", "abc", SECRET, SERVER)],
      [/not that of secret_key/, keyFile("other", SERVER, SECRET, SERVER)],
      [/no server_key.*SNAPBROKER_SERVER_KEY/, keyFile("lonely", PUBLIC, SECRET)],
      [/server_key is not a key/, keyFile("odd", PUBLIC, SECRET, "x")],
      [/cannot be read/, keyFile("again", PUBLIC, SECRET), "./nowhere"],
    ];
    for (const [message, client, server] of wrong) {
      const refused = await keysFor(TCP, client, server).catch((error: unknown) => error);
      assert(refused instanceof InvalidArgumentError, client);
      assert.match(refused.message, message);
      assert(!refused.message.includes(SECRET));
    }
  });

  test("is named by the environment where no argument names one", async () => {
    process.env["SNAPBROKER_CLIENT_KEY"] = keyFile("named", PUBLIC, SECRET);
    process.env["SNAPBROKER_SERVER_KEY"] = SERVER;
    try {
      assert.equal((await keysFor(TCP))?.serverKey, SERVER);
    } finally {
      delete process.env["SNAPBROKER_CLIENT_KEY"];
      delete process.env["SNAPBROKER_SERVER_KEY"];
    }
    assert.equal(await keysFor(TCP), undefined);
  });
});

test("the public key of a secret one is the library's", () => {
  assert.equal(publicOf(SECRET), PUBLIC);
  for (let round = 0; round < 20; round++) {
    const { publicKey, secretKey } = curveKeyPair();
    assert.equal(publicOf(secretKey), publicKey);
    assert(isKey(publicKey));
  }
});

describe("CURVE", () => {
  const server = curveKeyPair();
  const client = curveKeyPair();
  const allowed = new Set([client.publicKey]);
  const path = keyFile("curve", client.publicKey, client.secretKey, server.publicKey);
  const mailbox = { name: "a", kind: "active" };

  /** The list of who may connect, as a broker keeps it (RFC 27 of ZeroMQ): one for all tests, for its address is
   * one for the process, and is free again only a while after a close. */
  const list = new Reply({ linger: 0 });
  before(async () => {
    await list.bind("inproc://zeromq.zap.01");
    void (async () => {
      try {
        for (;;) {
          const [version, id, , , , , key] = (await list.receive()) as Buffer[];
          const known = key !== undefined && allowed.has(z85(key));
          await list.send([version ?? "", id ?? "", known ? "200" : "400", known ? "OK" : "no", "", ""]);
        }
      } catch (error) {
        if (!list.closed) throw error;
      }
    })();
  });
  after(() => {
    list.close();
  });

  async function remote(): Promise<FakeBroker> {
    const options = { curveServer: true, curveSecretKey: server.secretKey, zapDomain: "global" };
    return new FakeBroker((received) => received.succeed(mailbox), options, "tcp://127.0.0.1:*").start();
  }

  async function statOf(endpoint: string, options: ConnectOptions): Promise<unknown> {
    await using broker = await connect({ endpoint, snapshotter: "fake", connectTimeoutMs: 1500, ...options });
    return await broker.stat("a").catch((error: unknown) => error);
  }

  test("lets in whom the broker knows, and tells the others why not", async () => {
    using fake = await remote();
    assert.equal(((await statOf(fake.endpoint, { clientKey: path })) as { name: string }).name, "a");

    const stranger = curveKeyPair();
    const strange = keyFile("stranger", stranger.publicKey, stranger.secretKey, server.publicKey);
    const refused = await statOf(fake.endpoint, { clientKey: strange, connectTimeoutMs: 60_000 });
    assert(refused instanceof UnauthenticatedError && !refused.inDoubt, String(refused));
    assert.match(refused.message, /refused the key/);

    const bare = await statOf(fake.endpoint, { connectTimeoutMs: 60_000 });
    assert(bare instanceof UnauthenticatedError, String(bare));
    assert.match(bare.message, /needs a key.*SNAPBROKER_CLIENT_KEY/);

    const wrongServer = await statOf(fake.endpoint, { clientKey: path, serverKey: stranger.publicKey });
    assert(wrongServer instanceof UnauthenticatedError, String(wrongServer));
    assert.match(wrongServer.message, /server key is not this broker's/);
  });

  test("a key that is given later works without another connect", async () => {
    allowed.delete(client.publicKey);
    try {
      using fake = await remote();
      await using broker = await connect({ endpoint: fake.endpoint, snapshotter: "fake", clientKey: path });
      const refused = await broker.stat("a").catch((error: unknown) => error);
      assert(refused instanceof UnauthenticatedError);
      allowed.add(client.publicKey);
      for (;;) {
        const answer = await broker.stat("a").catch((error: unknown) => error);
        if (!(answer instanceof SnapbrokerError)) break;
        assert(answer instanceof UnauthenticatedError, String(answer));
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    } finally {
      allowed.add(client.publicKey);
    }
  });

  test("with keys, an endpoint without CURVE is told apart from one where nobody is", async () => {
    using fake = await new FakeBroker(undefined, {}, "tcp://127.0.0.1:*").start();
    const plain = await statOf(fake.endpoint, { clientKey: path, connectTimeoutMs: 60_000 });
    assert(plain instanceof UnauthenticatedError, String(plain));
    assert.match(plain.message, /it has no CURVE/);
    fake.stop();
    const nobody = await statOf(fake.endpoint, { clientKey: path, connectTimeoutMs: 200 });
    assert(nobody instanceof UnavailableError, String(nobody));
  });
});

function z85(bytes: Buffer): string {
  const characters = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
  let text = "";
  for (let at = 0; at < bytes.length; at += 4) {
    const value = bytes.readUInt32BE(at);
    for (let power = 4; power >= 0; power--) text += characters.charAt(Math.floor(value / 85 ** power) % 85);
  }
  return text;
}
