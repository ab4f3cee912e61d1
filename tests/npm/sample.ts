// A program that uses everything of the package with its types; compiled against what `npm pack` makes.
import { ImstreamClient, newMessageId, type ClientEvents, type Frame, type Message, type MessageEvents } from "imstream-client";
import { WebSocket } from "ws";

const client = new ImstreamClient({
  address: "ws://127.0.0.1:8080",
  userId: 10001,
  token: async () => "signed",
  lang: "en",
  wants: ["status", "asked", "thinking"],
  WebSocket,
});

// A line for each event: this does not compile when one is missing, or has another type.
const told: { [Type in keyof MessageEvents]: (event: MessageEvents[Type]) => string } = {
  accepted: ({ detail }) => `place ${detail.position ?? 1} at node ${detail.node}`,
  delta: ({ detail }) => detail.contents ?? "",
  restart: ({ detail }) => `attempt ${detail.attempt?.toFixed()}`,
  done: ({ detail }) => `${detail.finishReason} after ${detail.usage?.["completion_tokens"]?.toFixed()} tokens`,
  failed: ({ detail }) => detail.contents ?? detail.code,
  cancelled: ({ detail }) => detail?.contents ?? "never sent",
  expired: ({ detail }) => detail.code,
  refused: ({ detail }) => `again in ${(detail?.retryAfterMs ?? Infinity) / 1000} s`,
  notice: ({ detail }) => detail.code,
  status: ({ detail }) => `${detail.state}, in about ${(detail.etaMs ?? 0) / 1000} s (${detail.reason})`,
  asked: ({ detail }) => detail.contents ?? "",
  thinking: ({ detail }) => detail.contents ?? "",
};
const heard: { [Type in keyof ClientEvents]: (event: ClientEvents[Type]) => string } = {
  state: ({ detail }) => `${client.state} ${detail?.code} ${detail?.reason} ${detail?.frame?.contents} ${detail?.wait}`,
  notice: ({ detail }) => detail.contents ?? "",
  asked: ({ detail }) => follow(detail).contents,
};

function follow(message: Message): Message {
  message.addEventListener("accepted", told.accepted);
  message.addEventListener("delta", (event) => console.log(told.delta(event), message.text, message.attempt));
  message.addEventListener("restart", told.restart);
  message.addEventListener("done", told.done, { once: true });
  message.addEventListener("failed", told.failed);
  message.addEventListener("cancelled", told.cancelled);
  message.addEventListener("expired", told.expired);
  message.addEventListener("refused", () => setTimeout(() => client.resend(message), message.frame?.retryAfterMs));
  message.addEventListener("notice", told.notice);
  message.addEventListener("status", (event) => console.log(told.status(event), message.state, message.position));
  message.addEventListener("asked", told.asked);
  message.addEventListener("thinking", () => console.log(message.thinking));
  return message;
}

client.addEventListener("state", heard.state);
client.addEventListener("notice", heard.notice);
client.addEventListener("asked", heard.asked);
client.connect();
for (const { messageId, state } of client.known) if (state !== "done") follow(client.follow(messageId));
const message: Message = follow(client.send("Why?", [{ role: "user", content: "Hi" }], newMessageId(), { traceparent: "00-…" }));
const { status, isEnded }: Message = await message.ended;
const last: Frame | undefined = message.frame;
console.log(status === "done" && isEnded, last?.event);
client.cancel(message.id);
client.drop();
client.close();

// @ts-expect-error a status that does not exist
console.log(status === "over");
// @ts-expect-error the frame of an event is no text
message.addEventListener("delta", ({ detail }) => detail.trim());
// @ts-expect-error an address is missing
new ImstreamClient({ userId: 10001 });
// @ts-expect-error the service has no such event
new ImstreamClient({ address: "", userId: 10001, wants: ["everything"] });
