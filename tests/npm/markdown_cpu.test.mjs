// The time of the processor, which also counts what runs outside our code, such as regular expressions.
import assert from "node:assert/strict";
import { test } from "node:test";
import { ANSWER, HOSTILE } from "./markdown_hostile.mjs";
import { show } from "./markdown_support.mjs";

const LENGTH = 200_000;

/** The least time (ms) of a few runs, each without the waiting for other programs. */
function cpuTime(text, runs) {
  const times = Array.from({ length: runs }, () => {
    const before = process.cpuUsage();
    show(text);
    return process.cpuUsage(before).user / 1000;
  });
  return Math.min(...times);
}

// Those that are read with quadratic work take hundreds of times as long.
test("hostile texts of 200,000 characters take a small multiple of the time of an ordinary one", () => {
  const ordinary = cpuTime(ANSWER.repeat(LENGTH / ANSWER.length), 3);
  for (const [name, make] of Object.entries(HOSTILE)) {
    assert.ok(cpuTime(make(LENGTH), 1) < 20 * ordinary, name);
  }
});
