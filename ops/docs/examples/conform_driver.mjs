// Runs a client under `imstream conform`: `node conform_driver.mjs ./client.mjs`. See clients.md.
//
// The module exports `connect({ url, userId, token, report })`, which returns `send(frame)` and `close()`.
import { resolve } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const { connect } = await import(pathToFileURL(resolve(process.argv[2])).href);
let client;
for await (const line of createInterface({ input: process.stdin })) {
  const { step, tokens, ...fields } = JSON.parse(line);
  if (step === "connect") {
    client?.close();
    const token = () => (tokens.length > 1 ? tokens.shift() : tokens[0]);
    client = connect({ ...fields, token, report: (report) => console.log(JSON.stringify(report)) });
  } else client.send({ msgType: step === "send" ? "CHAT" : "CANCEL", ...fields });
}
