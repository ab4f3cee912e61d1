// The storage of the page in a browser that forbids all storage.
import assert from "node:assert/strict";
import { test } from "node:test";

function forbidden() {
  throw new DOMException("forbidden", "SecurityError");
}

test("a page without access to storage keeps nothing, and works", async () => {
  globalThis.indexedDB = { open: forbidden };
  globalThis.BroadcastChannel = forbidden;
  const { Archive, local } = await import("../../imstream/gateway/static/page-store.js");
  const archive = new Archive("10001 http://here/", forbidden);
  await archive.put({ id: "m1" });
  await archive.remove(["m1"]);
  assert.deepEqual(await archive.all(), []);
  archive.close();
  assert.equal(local.get("user"), null);
});
