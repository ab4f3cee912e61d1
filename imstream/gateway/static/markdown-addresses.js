// Web and mail addresses in a text that are not marked as links, as in GFM, but also within Chinese text.

/** Where a web address may begin. */
export const URL_START = /https?:\/\/|www\./gi;
const URL_START_HERE = /^(?:https?:\/\/|www\.)/i;
const URL_OR_MAIL = /https?:\/\/|www\.|@/gi;
const DOMAIN = /[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63}){0,9}(?![A-Za-z0-9_-])/y;
const MAIL_DOMAIN = /@[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+/y;
// An address extends to the next blank, but also ends where Chinese punctuation or a mark of ours begins.
const URL_REST = /(?::\d+)?(?:[/?#](?:[^\s<*`\u3000-\u303f\uff00-\uffef\u2018-\u201d]|\*(?!\*))*)?/y;

/** A text with links for the addresses in it. */
export function linked(text) {
  const nodes = [];
  let done = 0;
  const add = (start, address) => {
    if (start > done) nodes.push(text.slice(done, start));
    nodes.push({ tag: "a", href: hrefOf(address), children: [address] });
    URL_OR_MAIL.lastIndex = done = start + address.length;
  };
  URL_OR_MAIL.lastIndex = 0;
  for (let found; (found = URL_OR_MAIL.exec(text)); ) {
    const isMail = found[0] === "@";
    const address = isMail ? matchMail(text, found.index, done) : matchUrl(text, found.index);
    if (address) add(isMail ? found.index - address.indexOf("@") : found.index, address);
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

export function hrefOf(address) {
  if (/^(?:https?|mailto):/i.test(address)) return address;
  return `${/^www\./i.test(address) ? "http://" : "mailto:"}${address}`;
}

/** The mail address around an @; at least `from` is not part of it. */
function matchMail(text, at, from) {
  let start = at;
  while (start > from && /[A-Za-z0-9._+-]/.test(text[start - 1])) start--;
  MAIL_DOMAIN.lastIndex = at;
  const domain = MAIL_DOMAIN.exec(text)?.[0];
  if (start === at || !domain || !/[A-Za-z0-9]$/.test(domain)) return undefined;
  if (start - from >= 7 && /mailto:/i.test(text.slice(start - 7, start))) start -= 7;
  return text.slice(start, at) + domain;
}

/** The web address that begins at a place, without the punctuation behind it. */
export function matchUrl(text, start) {
  if (start && /[A-Za-z0-9@/.-]/.test(text[start - 1])) return undefined;
  const [scheme] = URL_START_HERE.exec(text.slice(start, start + 8));
  const isShort = scheme[0] === "w" || scheme[0] === "W";
  DOMAIN.lastIndex = start + (isShort ? 0 : scheme.length);
  const domain = DOMAIN.exec(text)?.[0] ?? "";
  const labels = domain.split(".");
  const last = labels.slice(-2).join("");
  if (!domain || last.includes("_") || (isShort && labels.length < 3)) return undefined;
  URL_REST.lastIndex = DOMAIN.lastIndex;
  return withoutEnd(text.slice(start, DOMAIN.lastIndex) + URL_REST.exec(text)[0]);
}

/** An address without the punctuation, the entity and the closing parentheses at its end that belong to the sentence. */
function withoutEnd(address) {
  let end = address.length;
  let extra = address.split(")").length - address.split("(").length; // closing parentheses that were not opened
  for (;;) {
    const last = address[end - 1];
    if ("?!.,:*_~'\"".includes(last)) end--;
    else if (last === ")" && extra-- > 0) end--;
    else if (last === ";") end -= /&[A-Za-z0-9]+;$/.exec(address.slice(Math.max(0, end - 33), end))?.[0].length ?? 1;
    else return address.slice(0, end);
  }
}
