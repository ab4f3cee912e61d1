// The text of a block of Markdown: emphasis, code, links, breaks (CommonMark 0.31, GFM), in time linear to its length.
//
// The result is a list of nodes: a string, or { tag, children } with attributes of the tag.

import { hrefOf, linked, matchUrl, URL_START } from "./markdown-addresses.js";

const MAX_DEPTH = 16; // of elements within each other; deeper ones are left out, their text is not
const MAX_PARENTHESES = 32;

const PLAIN = /[^\\`*_~[\]!<&\n]+/y;
const TICKS = /`+/g;
const TICKS_HERE = /`+/y;
const ESCAPE = /\\([!-/:-@[-`{-~])/y;
const ENTITY = /&(?:#[xX]([0-9a-fA-F]{1,6})|#([0-9]{1,7})|([A-Za-z][A-Za-z0-9]{1,31}));/y;
const ESCAPE_OR_ENTITY = new RegExp(`${ESCAPE.source}|${ENTITY.source}`, "g");
const AUTOLINK = /<([A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]*)>/y;
const LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?";
const MAIL_AUTOLINK = new RegExp(`<([A-Za-z0-9.!#$%&'*+/=?^_\`{|}~-]+@${LABEL}(?:\\.${LABEL})*)>`, "y");
const BLANKS = /[ \t]*(?:\n[ \t]*)?/y;
const POINTED = /<([^<>\\\n]*(?:\\.[^<>\\\n]*)*)>/y;
const TITLE = /"([^"\\]*(?:\\[^][^"\\]*)*)"|'([^'\\]*(?:\\[^][^'\\]*)*)'|\(([^()\\]*(?:\\[^][^()\\]*)*)\)/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;
// Chinese, Japanese and Korean have no blanks between words: their characters end and begin emphasis like blanks do.
const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u3000-\u303f\uff00-\uffef]/u;

/** Characters that embed or override the text direction: the page removes them from texts, so no entity may stand for one. */
const TURNS = new Set([0x202a, 0x202b, 0x202c, 0x202d, 0x202e, 0x2066, 0x2067]);

// Those that are written by people and models; numbers work for all characters.
const ENTITIES = new Map(
  Object.entries({
    amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", trade: "™", deg: "°",
    hellip: "…", mdash: "—", ndash: "–", lsquo: "‘", rsquo: "’", ldquo: "“", rdquo: "”", laquo: "«", raquo: "»",
    bull: "•", middot: "·", times: "×", divide: "÷", plusmn: "±", minus: "−", ne: "≠", le: "≤", ge: "≥", asymp: "≈",
    infin: "∞", larr: "←", rarr: "→", uarr: "↑", darr: "↓", harr: "↔", rArr: "⇒", check: "✓", euro: "€", pound: "£",
    yen: "¥", cent: "¢", sect: "§", para: "¶", auml: "ä", ouml: "ö", uuml: "ü", Auml: "Ä", Ouml: "Ö", Uuml: "Ü",
    szlig: "ß", eacute: "é", egrave: "è", ensp: "\u2002", emsp: "\u2003", thinsp: "\u2009", zwj: "\u200d",
  }),
);

/** A text with its escapes and entities resolved, as in addresses and titles. */
export function unescapeText(text) {
  if (!/[\\&]/.test(text)) return text;
  return text.replace(ESCAPE_OR_ENTITY, (whole, mark, ...entity) => mark ?? resolve(whole, ...entity));
}

function resolve(whole, hex, decimal, name) {
  if (name) return ENTITIES.get(name) ?? whole;
  const code = hex ? parseInt(hex, 16) : parseInt(decimal, 10);
  if (code === 0 || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return "\ufffd";
  return TURNS.has(code) ? "" : String.fromCodePoint(code);
}

/**
 * The nodes of a text. `isCell`: in a table, where `<br>` is the only way to break a line. `isGrowing`: more will follow,
 * so emphasis, code and links that have begun are shown as if they ended here.
 */
export function parseInlines(text, { isCell = false, isGrowing = false } = {}) {
  return new InlineParser(text, isCell, isGrowing).parse();
}

class InlineParser {
  #at = 0;
  #tokens = []; // a string, { tag, … } of an element without children, { open: tag, … }, { close: tag }, or a run of marks
  #brackets = []; // those that are open
  #dead = 0; // so many of them cannot begin a link, because one was found behind them
  #last; // the innermost run of marks that may still begin or end emphasis; each refers to the one before it

  constructor(text, isCell, isGrowing) {
    Object.assign(this, { text, isCell, isGrowing });
    this.ticks = undefined; // where runs of backticks begin, by their length
    this.plainEnd = 0; // where the next special character is
    this.urls = [...text.matchAll(URL_START)].map(({ index }) => index);
    this.urls.push(Infinity);
    this.url = 0; // the first of them that is not behind
  }

  parse() {
    const { text } = this;
    while (this.#at < text.length) if (!this.#special(text[this.#at])) this.#plain();
    if (this.isGrowing) this.#closeAll();
    this.#emphasise(undefined);
    return buildTree(this.#tokens);
  }

  #match(pattern) {
    pattern.lastIndex = this.#at;
    const found = pattern.exec(this.text);
    if (found) this.#at = pattern.lastIndex;
    return found;
  }

  #push(...tokens) {
    this.#tokens.push(...tokens);
    return true;
  }

  /** Parses an element that begins with a special character; false if it stands for itself. */
  #special(character) {
    switch (character) {
      case "\n":
        return this.#newline();
      case "\\":
        return this.#backslash();
      case "`":
        return this.#code();
      case "*":
      case "_":
      case "~":
        return this.#marks(character);
      case "!":
        return this.text[this.#at + 1] === "[" && this.#bracket(2);
      case "[":
        return this.#bracket(1);
      case "]":
        return this.#closeBracket();
      case "<":
        return this.#pointed();
      case "&":
        return this.#entity();
      default:
        return false;
    }
  }

  /** One special character without a meaning, or all up to the next one, or an address that is not marked as a link. */
  #plain() {
    const start = this.#at;
    while (this.urls[this.url] < start) this.url++;
    if (start === this.urls[this.url] && !this.#brackets.length) {
      const found = matchUrl(this.text, start);
      if (found) {
        this.#at += found.length;
        this.#push({ open: "a", href: hrefOf(found) }, found, { close: "a" });
        return;
      }
    }
    if (this.plainEnd <= start) this.plainEnd = this.#match(PLAIN) ? this.#at : start + 1;
    this.#at = Math.min(this.plainEnd, this.urls[this.url] === start ? this.urls[this.url + 1] : this.urls[this.url]);
    this.#push(this.text.slice(start, this.#at));
  }

  #newline() {
    const last = this.#tokens.length - 1;
    const before = typeof this.#tokens[last] === "string" ? this.#tokens[last] : "";
    let end = before.length;
    while (before[end - 1] === " ") end--;
    if (before) this.#tokens[last] = before.slice(0, end);
    this.#at++;
    return this.#push(before.length - end > 1 ? { tag: "br" } : "\n");
  }

  #backslash() {
    if (this.text[this.#at + 1] === "\n") {
      this.#at += 2;
      return this.#push({ tag: "br" });
    }
    const found = this.#match(ESCAPE);
    return found && this.#push(found[1]);
  }

  #entity() {
    const found = this.#match(ENTITY);
    return found && this.#push(resolve(...found));
  }

  #code() {
    if (!this.ticks) {
      this.ticks = new Map();
      for (const { 0: run, index } of this.text.matchAll(TICKS)) {
        if (!this.ticks.has(run.length)) this.ticks.set(run.length, []);
        this.ticks.get(run.length).push(index);
      }
      for (const places of this.ticks.values()) places.reverse();
    }
    const start = this.#at;
    const { length } = this.#match(TICKS_HERE)[0];
    const places = this.ticks.get(length) ?? [];
    while (places[places.length - 1] <= start) places.pop();
    const end = places.pop();
    this.#at = (end ?? start) + length;
    const rest = this.text.slice(this.#at);
    if (end === undefined && this.isGrowing && !/[\n`]/.test(rest)) {
      this.#at = this.text.length;
      return rest ? this.#push({ tag: "code", children: [rest] }) : true;
    }
    if (end === undefined) return this.#push(this.text.slice(start, this.#at));
    const code = this.text.slice(start + length, end).replace(/\n/g, " ");
    const isPadded = code[0] === " " && code[code.length - 1] === " " && /[^ ]/.test(code);
    return this.#push({ tag: "code", children: [isPadded ? code.slice(1, -1) : code] });
  }

  #pointed() {
    if (this.isCell && this.#match(/<br *\/?>/iy)) return this.#push({ tag: "br" });
    const [whole, address] = this.#match(AUTOLINK) ?? this.#match(MAIL_AUTOLINK) ?? [];
    if (!whole) return false;
    const href = /^[A-Za-z][A-Za-z0-9+.-]*:/.test(address) ? address : `mailto:${address}`;
    return this.#push({ open: "a", href }, address, { close: "a" });
  }

  #marks(character) {
    const start = this.#at;
    while (this.text[this.#at] === character) this.#at++;
    const [before, after] = [kindBefore(this.text, start), kindAt(this.text, this.#at)];
    const opens = after !== "blank" && (after !== "mark" || before !== "letter");
    const closes = before !== "blank" && (before !== "mark" || after !== "letter");
    const count = this.#at - start;
    const run = { character, count, length: count, endings: [], beginnings: [], place: this.#tokens.length };
    run.opens = opens && (character !== "_" || !closes || before === "mark");
    run.closes = closes && (character !== "_" || !opens || after === "mark");
    if (character === "~" && count !== 2) run.opens = run.closes = false; // one is written for "about"
    run.isHidden = this.isGrowing && this.#at === this.text.length; // it may get longer, and begin or end something
    run.isBeginning = run.opens && before !== "letter";
    if (run.opens || run.closes) this.#last = link(this.#last, run);
    return this.#push(run);
  }

  #bracket(length) {
    this.#brackets.push({ token: this.#tokens.length, at: this.#at, isImage: length === 2, last: this.#last });
    this.#push(this.text.slice(this.#at, this.#at + length));
    this.#at += length;
    return true;
  }

  #closeBracket() {
    const bracket = this.#brackets.pop();
    if (!bracket) return false;
    const isDead = this.#brackets.length < this.#dead && !bracket.isImage;
    this.#dead = Math.min(this.#dead, this.#brackets.length);
    const found = !isDead && this.#destination();
    if (!found) return false;
    this.#tokens[bracket.token] = { open: "a", ...found, isImage: bracket.isImage };
    this.#emphasise(bracket.last);
    if (!bracket.isImage) this.#dead = this.#brackets.length;
    return this.#push({ close: "a" });
  }

  /** Parses the part behind the text of a link: (address "title"). */
  #destination() {
    const start = this.#at;
    this.#at++;
    if (this.text[this.#at++] === "(") {
      this.#match(BLANKS);
      const href = this.#match(POINTED)?.[1] ?? (this.text[this.#at] === "<" ? undefined : this.#bareAddress());
      const end = this.#at;
      if (href !== undefined) {
        this.#match(BLANKS);
        const [title] = (this.#at > end && this.#match(TITLE)?.slice(1).filter((text) => text !== undefined)) || [];
        if (title !== undefined) this.#match(BLANKS);
        const isCut = this.isGrowing && this.#at === this.text.length;
        if (this.text[this.#at++] === ")" || isCut) return { href: unescapeText(href), title: title && unescapeText(title) };
      }
    }
    this.#at = start;
    return undefined;
  }

  #bareAddress() {
    const start = this.#at;
    let depth = 0;
    for (; this.#at < this.text.length; this.#at++) {
      const character = this.text[this.#at];
      if (character <= " " || character === "\x7f") break;
      if (character === "\\" && /[!-/:-@[-`{-~]/.test(this.text[this.#at + 1] ?? "")) this.#at++;
      else if (character === "(" && ++depth > MAX_PARENTHESES) return undefined;
      else if (character === ")" && --depth < 0) break;
    }
    return depth > 0 ? undefined : this.text.slice(start, this.#at);
  }

  /** Ends open elements: adds a run without a text for each that begins a word. Those that find no partner do nothing. */
  #closeAll() {
    const { length } = this.#tokens;
    for (let run = this.#last; run; run = run.previous) {
      if (!run.isBeginning) continue;
      const { character, length: count } = run;
      const place = this.#tokens.length;
      this.#push({ character, count, length: count, endings: [], beginnings: [], place, closes: true, isHidden: true });
    }
    for (const run of this.#tokens.slice(length)) this.#last = link(this.#last, run);
  }

  /** Pairs the runs of marks behind `bottom`; none of them is used again. */
  #emphasise(bottom) {
    const floors = new Map(); // for a kind of closing run: the place below which nothing opens it
    let closer; // the first run behind `bottom`
    for (let run = this.#last; run !== bottom; run = run.previous) closer = run;
    while (closer) {
      if (!closer.closes) {
        closer = closer.next;
        continue;
      }
      const kind = `${closer.character}${closer.opens}${closer.length % 3}`;
      let opener = closer.previous;
      const floor = floors.get(kind) ?? bottom?.place ?? -1;
      while (opener && opener.place > floor && !fits(opener, closer)) opener = opener.previous;
      if (opener && opener.place > floor) {
        const count = Math.min(opener.count, closer.count, 2);
        const tag = closer.character === "~" ? "del" : count === 2 ? "strong" : "em";
        opener.beginnings.push(tag);
        closer.endings.push(tag);
        opener.count -= count;
        closer.count -= count;
        join(opener, closer);
        if (!opener.count) join(opener.previous, opener.next);
        if (!closer.count) {
          join(closer.previous, closer.next);
          closer = closer.next;
        }
      } else {
        floors.set(kind, closer.previous?.place ?? -1);
        if (!closer.opens) join(closer.previous, closer.next);
        closer = closer.next;
      }
    }
    this.#last = bottom;
    if (bottom) bottom.next = undefined;
  }
}

/** Appends a run of marks to those before it. */
function link(previous, run) {
  run.previous = previous;
  if (previous) previous.next = run;
  return run;
}

function join(previous, next) {
  if (previous) previous.next = next;
  if (next) next.previous = previous;
}

/** Whether two runs of marks can be a pair. Those that could both begin and end follow the rule of three. */
function fits(opener, closer) {
  if (opener.character !== closer.character || !opener.opens) return false;
  const isOdd = (closer.opens || opener.closes) && closer.length % 3 !== 0 && (opener.length + closer.length) % 3 === 0;
  return !isOdd || closer.character === "~";
}

/** The character beside a run of marks: a blank, a punctuation mark, a letter, or a character of a script without blanks. */
function kindAt(text, place) {
  const character = place < text.length ? String.fromCodePoint(text.codePointAt(place)) : " ";
  if (/\s/.test(character)) return "blank";
  if (CJK.test(character)) return "cjk";
  return PUNCTUATION.test(character) ? "mark" : "letter";
}

function kindBefore(text, place) {
  if (place === 0) return "blank";
  return kindAt(text, place - (place > 1 && /[\udc00-\udfff]/.test(text[place - 1]) ? 2 : 1));
}

/** The tree that the tokens are the outline of. Links within links are left out, like all that is nested too deep. */
function buildTree(tokens) {
  const open = [{ children: [], isLink: false }];
  let text = "";
  const flush = () => {
    const { children, isLink } = open[open.length - 1];
    if (text) for (const node of isLink ? [text] : linked(text)) children.push(node);
    text = "";
  };
  const begin = ({ open: tag, ...rest }) => {
    flush();
    const parent = open[open.length - 1];
    const isLink = parent.isLink || tag === "a";
    if (open.length > MAX_DEPTH || (parent.isLink && tag === "a")) return open.push({ ...parent, isLink });
    const node = { tag, ...rest, children: [] };
    parent.children.push(node);
    return open.push({ children: node.children, isLink });
  };
  const end = () => {
    flush();
    open.pop();
  };
  for (const token of tokens) {
    if (typeof token === "string") text += token;
    else if (token.open) begin(token);
    else if (token.close) end();
    else if (token.tag) {
      flush();
      open[open.length - 1].children.push(token);
    } else {
      token.endings.forEach(end);
      if (!token.isHidden) text += token.character.repeat(token.count);
      for (const tag of token.beginnings.reverse()) begin({ open: tag });
    }
  }
  flush();
  return open[0].children;
}
