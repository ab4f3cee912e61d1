// A short client of imstream. It reads steps and writes reports, see clients.md.
import { createInterface } from "node:readline";
const WebSocket = globalThis.WebSocket ?? (await import("ws")).WebSocket; // Node.js has one from version 22 on
const report = (line) => console.log(JSON.stringify(line));

class Client {
  messages = new Map(); // those without an end
  failures = 0; // since the last login
  constructor(options) {
    Object.assign(this, options).connect(); // url, userId, tokens
  }
  connect() {
    const token = this.tokens.length > 1 ? this.tokens.shift() : this.tokens[0];
    if (token === this.refused) return report({ closed: 4500 });
    const accepted = [...this.messages.values()].filter(({ again }) => !again.CHAT);
    const init = { msgType: "INIT", userId: this.userId, token, resume: accepted.slice(-64).map(({ point }) => point) };
    this.socket = new WebSocket(`${this.url}?userId=${this.userId}`);
    this.socket.onopen = () => this.socket.send(JSON.stringify(init));
    this.socket.onmessage = ({ data }) => this.stopped || this.receive(JSON.parse(data));
    this.socket.onclose = ({ code }) => this.lost(code, token);
    this.socket.onerror = () => {}; // onclose follows
  }
  lost(closed, token) {
    this.heartbeats = clearInterval(this.heartbeats);
    if (closed === 4500 && this.code !== "INIT_TIMEOUT") this.refused = token;
    if (closed > 4500 && closed <= 4999) return this.stopped || report({ closed });
    const wait = closed === 1012 && !this.failures ? 0 : Math.min(30_000, 100 * 2 ** this.failures);
    this.failures += 1;
    setTimeout(() => this.stopped || this.connect(), wait * (0.5 + Math.random() / 2));
  }
  write(...frames) {
    if (!this.heartbeats) return; // not logged in
    for (const frame of frames) this.socket.send(JSON.stringify({ userId: this.userId, ...frame }));
  }
  send({ msgType, messageId, contents }) {
    const point = { messageId, attempt: 0, offset: 0 };
    const message = this.messages.get(messageId) ?? { point, text: "", again: {} };
    message.again[msgType] = { msgType, messageId, contents }; // after a lost connection
    if (msgType === "CHAT") this.messages.set(messageId, message);
    this.write(message.again[msgType]);
  }
  receive({ msgType, code, event, messageId, contents, attempt = 0, offset = 0, retryAfterMs, heartbeatMs = 25_000 }) {
    const message = this.messages.get(messageId);
    const end = (outcome) => this.messages.delete(messageId) && report({ messageId, outcome, text: message.text });
    this.code = code;
    if (msgType === "INIT") {
      this.failures = 0;
      this.heartbeats = setInterval(() => this.write({ msgType: "HEARTBEAT" }), heartbeatMs);
      for (const { again } of this.messages.values()) this.write(...Object.values(again));
    } else if (msgType === "SYSTEM" && message?.again.CHAT) {
      if (retryAfterMs === undefined) end("refused");
      else setTimeout(() => this.messages.has(messageId) && this.write(...Object.values(message.again)), retryAfterMs);
    } else if (msgType === "CHAT" && message) {
      if (["done", "failed", "cancelled"].includes(event)) end(event);
      else if (code === "EXPIRED") end("expired");
      else if (["accepted", "restart", "delta"].includes(event)) {
        const text = event === "delta" ? message.text + contents : "";
        Object.assign(message, { text, point: { messageId, attempt, offset } });
        delete message.again.CHAT;
      }
    }
  }
}

let client;
for await (const line of createInterface({ input: process.stdin })) {
  const { step, ...options } = JSON.parse(line);
  if (step !== "connect") client.send({ msgType: step === "send" ? "CHAT" : "CANCEL", ...options });
  else (client?.socket.close(), Object.assign(client ?? {}, { stopped: true }), (client = new Client(options)));
}
