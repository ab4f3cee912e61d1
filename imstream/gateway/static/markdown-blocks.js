// The block structure of Markdown (CommonMark 0.31 with the tables and tasks of GFM), parsed line by line.
//
// Lines that are complete are parsed once. The last line of a text that still grows is parsed on trial and forgotten, so
// the tree depends on the text alone and not on the pieces in which it came. Work per line is bounded by its length and
// by MAX_DEPTH.
//
// HTML has no meaning here, and `[label]: address` defines no link: it would change blocks that are finished.

import { unescapeText } from "./markdown-inlines.js";

const MAX_DEPTH = 32; // of lists, items and quotes within each other; deeper markers are text

const MARKER = /(?:[-+*]|(\d{1,9})([.)]))(?=[ \t]|$)/y;
const HEADING = /(#{1,6})(?=[ \t]|$)/y;
const FENCE = /(?:(`{3,})[^`]*|(~{3,}).*)$/y;
const CLOSING = /(?:`{3,}|~{3,})[ \t]*$/y;
const RULE = /(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/y;
const UNDERLINE = /(?:(=+)|-+)[ \t]*$/y;
const DELIMITERS = /[-:| \t]*$/y;
const TASK = /\[([ xX])\][ \t]+(?=[^ \t])/y;

/** A position in a line. Tabs reach to the next multiple of four columns, and may be consumed in part. */
class Line {
  at = 0;
  column = 0;
  isPartOfTab = false;

  constructor(text) {
    this.text = text;
  }

  /** Looks ahead to the next character that is no blank. */
  measure() {
    let { at, column } = this;
    for (; this.text[at] === " " || this.text[at] === "\t"; at++) column += this.text[at] === "\t" ? 4 - (column % 4) : 1;
    this.next = at;
    this.indent = column - this.column;
    this.isBlank = at === this.text.length;
  }

  /** Consumes up to so many columns of blanks. */
  skip(columns) {
    while (columns > 0 && (this.text[this.at] === " " || this.text[this.at] === "\t")) {
      const width = this.text[this.at] === "\t" ? 4 - (this.column % 4) : 1;
      this.isPartOfTab = width > columns;
      this.column += Math.min(width, columns);
      columns -= width;
      if (!this.isPartOfTab) this.at++;
    }
  }

  /** Consumes blanks, and so many other characters behind them. */
  take(length) {
    this.skip(Infinity);
    this.at += length;
    this.column += length;
  }

  match(pattern) {
    pattern.lastIndex = this.next;
    return pattern.exec(this.text);
  }

  get rest() {
    return this.isPartOfTab ? " ".repeat(4 - (this.column % 4)) + this.text.slice(this.at + 1) : this.text.slice(this.at);
  }
}

/** The text of a heading without its closing marks. */
function headingText(text) {
  const trimmed = trimBlanks(text);
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end--;
  return end === 0 || " \t".includes(trimmed[end - 1]) ? trimBlanks(trimmed.slice(0, end)) : trimmed;
}

function trimBlanks(text) {
  let [start, end] = [0, text.length];
  while (start < end && " \t".includes(text[start])) start++;
  while (end > start && " \t\n".includes(text[end - 1])) end--;
  return text.slice(start, end);
}

/** The cells of a row. A bar that belongs to a cell is escaped, even in a code span. */
function cellsOf(line) {
  const text = trimBlanks(line);
  const cells = [];
  let start = text[0] === "|" ? 1 : 0;
  for (let at = start; at < text.length; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "|") {
      cells.push(text.slice(start, at));
      start = at + 1;
    }
  }
  if (start < text.length || !cells.length) cells.push(text.slice(start));
  return cells.map((cell) => trimBlanks(cell).replace(/\\\|/g, "|"));
}

/** The alignments that the line below the head of a table gives; undefined if it is no such line. */
function alignmentsOf(line) {
  const text = line.match(DELIMITERS)?.[0];
  if (!text?.includes("|")) return undefined;
  const cells = cellsOf(text);
  if (!cells.every((cell) => /^:?-+:?$/.test(cell))) return undefined;
  return cells.map((cell) => (cell.endsWith(":") ? (cell[0] === ":" ? "center" : "end") : cell[0] === ":" ? "start" : ""));
}

/**
 * The tree of blocks. Each has a `kind`. Those with `children` also have `settled`: how many of these will never change.
 *
 * document | quote | list (start: its number; isLoose) | item (isTask) | paragraph (lines; isDone: for a task) |
 * heading (text; level; outline: the levels of the headings that it is under) | rule | code (lines, info) |
 * table (alignments; cells: of its head) | row (cells)
 */
export class BlockParser {
  root = { kind: "document", children: [], settled: 0 };
  #open = [this.root]; // from the document to the innermost block that may continue
  #matched = 1; // how many of them continue in this line
  #hasBegun = false; // whether a block has begun in this line
  #blank = Infinity; // after a blank line: the place of the innermost quote around it, outside which it separates nothing
  #outline = []; // the levels of the headings above

  /** Parses a line that is complete. */
  add(text) {
    this.#parse(new Line(text));
    this.#open.forEach((block, place) => {
      if (block.children) block.settled = block.children.length - (place < this.#open.length - 1 ? 1 : 0);
    });
  }

  /** Parses the beginning of a line; returns a function that undoes this. */
  tryLine(text) {
    const [open, blank, outline] = [this.#open, this.#blank, this.#outline];
    const copies = open.map((block) => ({ ...block, children: block.children?.slice(), lines: block.lines?.slice() }));
    this.#open = open.slice();
    this.#parse(new Line(text));
    return () => {
      open.forEach((block, place) => Object.assign(block, copies[place]));
      [this.#open, this.#blank, this.#outline] = [open, blank, outline];
    };
  }

  get innermost() {
    return this.#open[this.#open.length - 1];
  }

  #parse(line) {
    this.#matched = 1;
    this.#hasBegun = false;
    while (this.#matched < this.#open.length && this.#goesOn(this.#open[this.#matched], line)) this.#matched++;
    const isInCode = this.#matched === this.#open.length && this.innermost.kind === "code";
    while (!line.isUsed && !isInCode && this.#begins(line));
    if (!line.isUsed) this.#addRest(line);
    const separates = line.isBlank && !this.#hasBegun && !this.innermost.fence;
    this.#blank = separates ? Math.max(0, this.#open.map(({ kind }) => kind).lastIndexOf("quote")) : Infinity;
  }

  /** Whether an open block continues in a line. Its markers are consumed. */
  #goesOn(block, line) {
    line.measure();
    if (block.kind === "list") return true;
    if (block.kind === "quote") return takeQuote(line);
    if (block.kind === "item") {
      if (line.isBlank ? !block.children.length : line.indent < block.indent) return false;
      line.skip(block.indent);
      return true;
    }
    if (block.kind !== "code") return !line.isBlank; // a paragraph or a table
    if (!block.fence && !line.isBlank && line.indent < 4) return false;
    if (block.fence && closesFence(block.fence, line)) {
      line.isUsed = true;
      this.#open.length = this.#matched;
    } else line.skip(block.indent);
    return true;
  }

  /** Begins the block that a line has a marker for. Whether there may be another one behind the marker. */
  #begins(line) {
    line.measure();
    if (line.isBlank) return false;
    const parent = this.#open[this.#matched - 1];
    if (line.indent > 3) {
      if (this.innermost.kind !== "paragraph") {
        this.#push({ kind: "code", lines: [], info: "", indent: 4 });
        line.skip(4);
      }
      return false;
    }
    if (this.#beginsLeaf(parent, line)) {
      line.isUsed = true;
      return false;
    }
    if (this.#matched >= MAX_DEPTH) return false;
    if (takeQuote(line)) return this.#push({ kind: "quote", children: [], settled: 0 });
    return this.#beginsItem(parent, line);
  }

  #beginsLeaf(parent, line) {
    let found;
    if ((found = line.match(HEADING))) {
      return this.#pushHeading(found[1].length, headingText(line.text.slice(HEADING.lastIndex)));
    }
    if ((found = line.match(FENCE))) {
      const fence = found[1] ?? found[2];
      const info = unescapeText(trimBlanks(found[0].slice(fence.length)));
      return this.#push({ kind: "code", lines: [], info, indent: line.indent, fence });
    }
    if (parent.kind === "paragraph" && (found = line.match(UNDERLINE))) {
      const text = trimBlanks(parent.lines.join("\n"));
      this.#drop();
      return this.#pushHeading(found[1] ? 1 : 2, text);
    }
    if (parent.kind === "paragraph" && this.#beginsTable(parent, line)) return true;
    return line.match(RULE) && this.#push({ kind: "rule" });
  }

  #beginsTable(paragraph, line) {
    const alignments = alignmentsOf(line);
    const cells = alignments && cellsOf(paragraph.lines[paragraph.lines.length - 1]);
    if (cells?.length !== alignments?.length || !cells) return false;
    paragraph.lines.pop();
    if (!paragraph.lines.length) this.#drop();
    return this.#push({ kind: "table", alignments, cells, children: [], settled: 0 });
  }

  #beginsItem(parent, line) {
    const found = line.match(MARKER);
    if (!found) return false;
    const [marker, number, mark = marker] = found;
    const isEmpty = !trimBlanks(line.text.slice(line.next + marker.length));
    if (parent.kind === "paragraph" && (isEmpty || Number(number ?? 1) !== 1)) return false;
    const before = line.indent + marker.length;
    line.take(marker.length);
    line.measure();
    const after = isEmpty || line.indent > 4 ? 1 : line.indent;
    line.skip(after);
    this.#open.length = this.#matched;
    if (this.innermost.mark !== mark) {
      this.#push({ kind: "list", mark, start: number && Number(number), isLoose: false, children: [], settled: 0 });
    }
    return this.#push({ kind: "item", indent: before + after, isTask: false, children: [], settled: 0 });
  }

  /** Adds the rest of a line behind all markers. */
  #addRest(line) {
    line.measure();
    const isLazy = !this.#hasBegun && !line.isBlank && this.innermost.kind === "paragraph";
    if (!isLazy) this.#open.length = this.#matched;
    const { innermost } = this;
    const text = line.text.slice(line.next);
    if (innermost.kind === "code") innermost.lines.push(line.rest);
    else if (line.isBlank) return;
    else if (innermost.kind === "paragraph") innermost.lines.push(text);
    else if (innermost.kind === "table") innermost.children.push(rowOf(innermost, text));
    else this.#pushParagraph(text, line);
  }

  #pushParagraph(text, line) {
    const task = this.innermost.kind === "item" && !this.innermost.children.length ? line.match(TASK) : null;
    if (task) this.innermost.isTask = true;
    const lines = [task ? text.slice(task[0].length) : text];
    this.#push({ kind: "paragraph", lines, isDone: task ? task[1] !== " " : undefined });
  }

  #pushHeading(level, text) {
    this.#outline = [...this.#outline.filter((above) => above < level), level];
    return this.#push({ kind: "heading", level, text, outline: this.#outline });
  }

  /** Adds a block to the innermost one of this line that takes it. */
  #push(block) {
    this.#open.length = this.#matched;
    while (!CHILDREN[this.innermost.kind]?.(block)) this.#open.pop();
    const parent = this.innermost;
    const place = this.#open.length - 1;
    const list = parent.kind === "item" ? this.#open[place - 1] : parent;
    if (list.kind === "list" && parent.children.length && place >= this.#blank) list.isLoose = true;
    parent.children.push(block);
    if (block.children || block.lines) this.#open.push(block);
    this.#matched = this.#open.length;
    return (this.#hasBegun = true);
  }

  /** Removes the innermost block, a paragraph that turned out to be something else. */
  #drop() {
    this.#open.pop();
    this.innermost.children.pop();
    this.#matched--;
  }
}

const CHILDREN = {
  document: () => true,
  quote: () => true,
  item: () => true,
  list: ({ kind }) => kind === "item",
};

function rowOf({ cells, alignments }, text) {
  return { kind: "row", cells: cellsOf(text).slice(0, cells.length), alignments };
}

function takeQuote(line) {
  if (line.indent > 3 || line.text[line.next] !== ">") return false;
  line.take(1);
  line.skip(1);
  return true;
}

function closesFence(fence, line) {
  const marks = line.indent < 4 && line.match(CLOSING)?.[0];
  return Boolean(marks) && marks[0] === fence[0] && trimBlanks(marks).length >= fence.length;
}
