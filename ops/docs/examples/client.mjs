// A client of imstream in 60 lines. It reads steps and writes reports, see clients.md.
import { createInterface } from "node:readline";
const WebSocket = globalThis.WebSocket ?? (await import("ws")).WebSocket; // Node.js has one from version 22 on
const report = (line) => console.log(JSON.stringify(line));

class Client {
  messages = new Map(); // those without an end
  failures = 0;
  constructor(options) {
    Object.assign(this, options).connect();
  }
  connect() {
    this.token = this.tokens.length > 1 ? this.tokens.shift() : this.tokens[0];
    if (this.token === this.refused) return report({ closed: 4500 });
    this.socket = new WebSocket(`${this.url}?userId=${this.userId}`);
    this.socket.onopen = () => this.write({ msgType: "INIT", token: this.token, resume: this.accepted().slice(-64) });
    this.socket.onmessage = ({ data }) => this.stopped || this.receive(JSON.parse(data));
    this.socket.onclose = ({ code }) => this.stopped || this.lost(code);
    this.socket.onerror = () => {}; // onclose follows
  }
  accepted() {
    const accepted = [...this.messages.values()].filter((message) => message.accepted);
    return accepted.map(({ messageId, attempt, offset }) => ({ messageId, attempt, offset }));
  }
  lost(code) {
    this.timer = clearInterval(this.timer);
    if (code === 4500 && this.code !== "INIT_TIMEOUT") this.refused = this.token;
    if (code > 4500 && code <= 4999) return report({ closed: code });
    const wait = code === 1012 && !this.failures ? 0 : Math.min(30_000, 100 * 2 ** this.failures);
    this.failures += 1;
    setTimeout(() => this.stopped || this.connect(), wait * (0.5 + Math.random() / 2));
  }
  write(frame) {
    if (this.timer || frame.msgType === "INIT") this.socket.send(JSON.stringify({ userId: this.userId, ...frame }));
  }
  send({ messageId, contents }) {
    if (!this.messages.has(messageId)) this.messages.set(messageId, { messageId, contents, text: "", attempt: 0, offset: 0 });
    this.write({ msgType: "CHAT", messageId, contents });
  }
  cancel({ messageId }) {
    if (this.messages.has(messageId)) this.messages.get(messageId).cancelled = true; // again after a lost connection
    this.write({ msgType: "CANCEL", messageId });
  }
  loggedIn(heartbeatMs = 25_000) {
    this.failures = 0;
    this.timer ??= setInterval(() => this.write({ msgType: "HEARTBEAT" }), heartbeatMs);
    for (const message of this.messages.values()) if (!message.accepted) this.send(message);
    for (const message of this.messages.values()) if (message.cancelled) this.cancel(message);
  }
  receive({ msgType, code, event, messageId, contents, attempt, offset, retryAfterMs, heartbeatMs }) {
    const message = this.messages.get(messageId);
    const end = (outcome) => this.messages.delete(messageId) && report({ messageId, outcome, text: message.text });
    this.code = code;
    if (msgType === "INIT") this.loggedIn(heartbeatMs);
    else if (msgType === "SYSTEM" && message && !message.accepted && retryAfterMs) setTimeout(() => this.send(message), retryAfterMs);
    else if (msgType === "SYSTEM" && message && !message.accepted) end("refused");
    else if (msgType !== "CHAT" || !message) return;
    else if (event === "accepted") Object.assign(message, { accepted: true, text: "", attempt: 0, offset: 0 });
    else if (event === "restart") Object.assign(message, { text: "", attempt, offset: 0 });
    else if (event === "delta") Object.assign(message, { text: message.text + contents, attempt, offset });
    else if (["done", "failed", "cancelled"].includes(event)) end(event);
    else if (code === "EXPIRED") end("expired");
  }
}

let client;
for await (const line of createInterface({ input: process.stdin })) {
  const { step, ...options } = JSON.parse(line);
  if (step !== "connect") client[step](options);
  else (client?.socket.close(), Object.assign(client ?? {}, { stopped: true }), (client = new Client(options)));
}
