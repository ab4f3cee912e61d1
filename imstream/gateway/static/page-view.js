/** Drawing once per animation frame, and the scroll position of the conversation. */

export const $ = (id) => document.getElementById(id);

const dirty = new Set();
let pinned = true; // whether to keep the newest text in view

/** Calls `draw` of objects in the next animation frame, and keeps the newest text in view. */
export function draw(...changed) {
  if (!dirty.size) requestAnimationFrame(drawDirty);
  for (const one of changed) dirty.add(one);
}

function drawDirty() {
  const changed = [...dirty];
  dirty.clear();
  for (const one of changed) one.draw();
  keepInView();
}

function keepInView() {
  if (pinned) $("log").scrollTop = $("log").scrollHeight;
}

/** Shows the newest text, and keeps it in view until the user scrolls up. */
export function pin() {
  pinned = true;
  keepInView();
}

$("log").onscroll = () => {
  pinned = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 48;
  if (pinned && $("latest") === document.activeElement) $("log").focus();
  $("latest").hidden = pinned;
};
$("latest").onclick = pin;
new ResizeObserver(keepInView).observe($("log"));

/** Asks a question in a dialog. Returns the index of the chosen button; -1 for none. */
export function choose(question, buttons) {
  const dialog = $("dialog");
  const opener = document.activeElement;
  $("dialog-text").textContent = question;
  $("dialog-buttons").replaceChildren(
    ...buttons.map((text, index) => {
      const button = Object.assign(document.createElement("button"), { textContent: text, value: String(index) });
      button.className = "main";
      button.autofocus = index === buttons.length - 1; // nothing is deleted by mistake
      return button;
    }),
  );
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      if (dialog.open) return; // the event of the question before
      if (opener?.isConnected) opener.focus();
      resolve(dialog.returnValue === "" ? -1 : Number(dialog.returnValue));
    };
  });
}
