/** Where things are in the repository, seen from what was compiled. */

import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** The package's folder: `dist/test` is below it. */
export const home = join(dirname(fileURLToPath(import.meta.url)), "..", "..");
const repository = join(home, "..", "..");

/** The golden vectors. */
export const vectors = join(repository, "clients", "vectors", "vectors.json");

/** The daemon: SNAPBROKERD, else the one of the repository's environment. */
export function snapbrokerd(): string {
  const chosen = process.env["SNAPBROKERD"] ?? join(repository, ".venv", "bin", "snapbrokerd");
  if (!existsSync(chosen)) throw new Error(`${chosen} is not there: run .ci/setup, or set SNAPBROKERD`);
  return chosen;
}
