// The client of imstream under `imstream conform`, in Node.js.
import { createInterface } from "node:readline";
import { WebSocket } from "ws";
import { ImstreamClient } from "../../imstream/gateway/static/imstream.js";

const report = (line) => console.log(JSON.stringify(line));
let client;

function connect({ url, userId, tokens }) {
  client?.close();
  const token = () => (tokens.length > 1 ? tokens.shift() : tokens[0]);
  const address = url.replace(/ws$/, "");
  const made = (client = new ImstreamClient({ address, userId, token, WebSocket, firstWait: 50, longestWait: 200 }));
  made.addEventListener("state", ({ detail }) => {
    if (made.state === "closed" && detail.code !== 1000) report({ closed: detail.code });
  });
  made.connect();
}

function send({ messageId, contents }) {
  const sender = client;
  const message = sender.send(contents, [], messageId);
  message.addEventListener("refused", ({ detail: { retryAfterMs } }) => {
    if (retryAfterMs) setTimeout(() => sender.resend(message), retryAfterMs);
    else report({ messageId, outcome: "refused" });
  });
  message.ended.then(({ status, text }) => report({ messageId, outcome: status, text }));
}

const steps = { connect, send, cancel: ({ messageId }) => client.cancel(messageId) };
for await (const line of createInterface({ input: process.stdin })) {
  const { step, ...options } = JSON.parse(line);
  steps[step](options);
}
