// A short client of imstream. With conform_driver.mjs, it passes `imstream conform`: see clients.md.
const WebSocket = globalThis.WebSocket ?? (await import("ws")).WebSocket; // Node.js has one from version 22 on

/** @param {{url: string, userId: number, token: () => string, report: (line: object) => void}} options */
export function connect({ url, userId, token, report }) {
  const messages = /** @type {Map<string, {text: string, point?: object, again: Map<string, object>}>} */ (new Map());
  let [isOnline, last, wait, timer] = [false, { code: "" }, 100, setTimeout(() => {})]; // next attempt, or heartbeats
  /** @type {globalThis.WebSocket} */ let socket;
  const write = (/** @type {object} */ frame) => isOnline && socket.send(JSON.stringify({ userId, ...frame }));
  function open(/** @type {string} */ sent) {
    const resume = [...messages.values()].flatMap(({ point }) => point ?? []).slice(-64);
    socket = new WebSocket(`${url}?userId=${userId}`);
    socket.onopen = () => socket.send(JSON.stringify({ msgType: "INIT", userId, token: sent, resume }));
    socket.onmessage = ({ data }) => receive((last = JSON.parse(data)));
    socket.onerror = () => {}; // onclose follows
    socket.onclose = ({ code: closed }) => {
      isOnline = false;
      clearInterval(timer);
      const next = token();
      const isRefused = next === sent && last.code !== "INIT_TIMEOUT";
      if (closed === 4500 ? isRefused : closed > 4500 && closed < 5000) return report({ closed });
      timer = setTimeout(open, wait * (1 + Math.random()), next);
      wait = Math.min(30_000, 2 * wait);
    };
  }
  function send(/** @type {{msgType: string, messageId: string, contents?: string}} */ frame) {
    const message = messages.get(frame.messageId) ?? { text: "", again: new Map() };
    messages.set(frame.messageId, message);
    message.again.set(frame.msgType, frame); // frames that may not have arrived
    write(frame);
  }
  function receive(/** @type {import("imstream-client").Frame} */ frame) {
    const { msgType, code, event, messageId = "", contents, attempt, offset, retryAfterMs, heartbeatMs } = frame;
    if (msgType === "INIT") {
      [isOnline, timer] = [true, setInterval(write, heartbeatMs ?? 25_000, { msgType: "HEARTBEAT" })];
      messages.forEach(({ again }) => again.forEach(write));
    }
    const message = messages.get(messageId);
    if (!message || (msgType !== "CHAT" && msgType !== "SYSTEM")) return;
    const what = event ?? (code === "EXPIRED" ? "expired" : "refused");
    if (what === "refused" && retryAfterMs) setTimeout(() => message.again.forEach(write), retryAfterMs);
    else if (["accepted", "restart", "delta"].includes(what)) {
      wait = 100;
      message.again.delete("CHAT");
      message.text = what === "delta" ? message.text + contents : "";
      message.point = { messageId, attempt, offset };
    } else if (["done", "failed", "cancelled", "expired"].includes(what) || (what === "refused" && !message.point)) {
      messages.delete(messageId);
      message.again.clear();
      report({ messageId, outcome: what, text: message.text });
    }
  }
  function close() {
    clearInterval(timer);
    socket.onmessage = socket.onclose = null;
    socket.close();
  }
  open(token());
  return { send, close };
}
