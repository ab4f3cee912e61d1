// Shows the Markdown of an answer while it is written: const view = new MarkdownView(element, texts); view.update(text).
//
// Builds elements, never HTML. The result depends on the text alone, not on the pieces in which it came: blocks that
// are complete are neither parsed nor touched again, and the others keep their elements, so a selection stays.
import { BlockParser } from "./markdown-blocks.js";
import { parseInlines } from "./markdown-inlines.js";

/** The beginning of a line that may yet become anything: shown when it has. */
const MARKS_ONLY = /^[-=*+_~`#|:> \t]*(?:\d{1,9}[.)]?[ \t]*)?$/;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;
const CONTAINERS = new Set(["blockquote", "ul", "ol", "li", "div", "table", "tbody", "thead", "tr"]);
const TEXT = 3; // Node.TEXT_NODE
const COPIED_FOR = 1500; // ms

export class MarkdownView {
  #element;
  #label;
  #copy;
  #heading;
  #state = new WeakMap(); // of an element: its shown content
  #parser = new BlockParser();
  #text = "";
  #parsed = 0; // length of the text that is in complete lines
  #isDone = false;
  #end; // the element where the text ends

  /**
   * @param element filled with the answer; `[data-end]` is the innermost element at its end
   * @param label gives the texts for "copy", "copied", "code" and "table", and for "taskDone" and "taskOpen"
   * @param copy puts a text into the clipboard
   * @param heading the level (1 to 6) of the first heading: levels follow from the outline, so that none is skipped
   */
  constructor(element, { label, copy, heading = 3 }) {
    this.#element = element;
    this.#label = label;
    this.#copy = copy;
    this.#heading = heading;
  }

  /** Shows a text, usually the last one with more at its end. `done`: nothing will follow. */
  update(text, { done = false } = {}) {
    text = text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text;
    if (text === this.#text && done === this.#isDone) return;
    if (this.#isDone || !text.startsWith(this.#text)) this.#reset();
    [this.#text, this.#isDone] = [text, done];
    for (let end; (end = text.indexOf("\n", this.#parsed)) >= 0; this.#parsed = end + 1) {
      this.#parser.add(text.slice(this.#parsed, end));
    }
    const line = text.slice(this.#parsed);
    const undo = line && (done || !MARKS_ONLY.test(line)) ? this.#parser.tryLine(line) : () => {};
    this.#fill(this.#element, this.#parser.root);
    this.#markEnd();
    undo();
  }

  /** Writes the texts of `label` again, in another language. */
  relabel() {
    for (const tag of ["pre", "button", "input", "div"]) {
      for (const element of this.#element.getElementsByTagName(tag)) this.#of(element).name?.();
    }
  }

  #reset() {
    this.#element.replaceChildren();
    this.#state = new WeakMap();
    this.#parser = new BlockParser();
    this.#parsed = 0;
  }

  #of(element) {
    if (!this.#state.has(element)) this.#state.set(element, { settled: 0 });
    return this.#state.get(element);
  }

  /** Puts the children of a block into an element. The first ones, which are settled, are there already. */
  #fill(element, { children, settled }) {
    const state = this.#of(element);
    const count = children.length - (this.#mayBecomeTable(children[children.length - 1]) ? 1 : 0);
    for (let index = state.settled; index < count; index++) {
      this.#place(element, index, (old) => this.#show(children[index], old));
    }
    trim(element, count);
    state.settled = settled;
  }

  /** A row with bars is shown when the next line decides whether it is the head of a table. */
  #mayBecomeTable(block) {
    return this.#isGrowing(block) && block.lines?.length === 1 && block.lines[0][0] === "|";
  }

  #isGrowing(block) {
    return !this.#isDone && block === this.#parser.innermost && block.kind === "paragraph";
  }

  #place(parent, index, make) {
    const old = parent.childNodes[index];
    const fresh = make(old);
    if (fresh === old) return;
    if (parent === this.#element) fresh.dir = "auto"; // the markers of lists, the bar of quotes, the columns of tables
    if (old) old.replaceWith(fresh);
    else parent.append(fresh);
  }

  /** The element itself if it was made for the same kind of block, else a new one. */
  #reuse(old, kind, tag, build = () => {}) {
    if (old && this.#state.get(old)?.kind === kind) return old;
    const element = this.#create(tag);
    this.#of(element).kind = kind;
    build(element);
    return element;
  }

  #create(tag, className = "", ...children) {
    const element = this.#element.ownerDocument.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }

  /** The element that shows a block. */
  #show(block, old) {
    switch (block.kind) {
      case "paragraph":
        return this.#write(this.#reuse(old, "paragraph", "p"), block.lines.join("\n").trimEnd(), {
          isDone: block.isDone,
          isGrowing: this.#isGrowing(block),
        });
      case "heading": {
        const tag = `h${Math.min(6, this.#heading + block.outline.length - 1)}`;
        const element = this.#reuse(old, tag, tag);
        element.dataset.level = block.level;
        return this.#write(element, block.text);
      }
      case "rule":
        return this.#reuse(old, "rule", "hr");
      case "code":
        return this.#showCode(block, old);
      case "table":
        return this.#showTable(block, old);
      case "row":
        return this.#showRow(this.#reuse(old, "row", "tr"), "td", block);
      default:
        return this.#showContainer(block, old);
    }
  }

  #showContainer(block, old) {
    const { kind, start, isLoose, isTask } = block;
    const tag = { quote: "blockquote", item: "li", list: start === undefined ? "ul" : "ol" }[kind];
    const element = this.#reuse(old, tag, tag);
    const className = isLoose ? "loose" : isTask ? "task" : "";
    if (element.className !== className) element.className = className;
    if (tag === "ol" && element.start !== start) element.start = start;
    this.#fill(element, block);
    return element;
  }

  #showCode({ lines, info, fence }, old) {
    const element = this.#reuse(old, "code", "div", (made) => this.#buildCode(made));
    const { language, code, pre } = this.#of(element);
    const [name] = info.split(/[ \t]/, 1);
    if (language.textContent !== name || !code.className) {
      language.textContent = name;
      code.className = `language-${name}`;
      this.#of(pre).name();
    }
    let end = lines.length;
    if (!fence) while (end && !lines[end - 1].trim()) end--;
    setText(code.firstChild, lines.slice(0, end).join("\n"));
    return element;
  }

  #buildCode(element) {
    const language = this.#create("span", "language");
    const button = this.#create("button", "quiet");
    const code = this.#create("code", "", this.#element.ownerDocument.createTextNode(""));
    const pre = this.#create("pre", "", code);
    this.#makeScrollable(pre, () => `${this.#label("code")} ${language.textContent}`.trim());
    button.type = "button";
    button.onclick = async () => {
      await this.#copy(code.textContent);
      button.textContent = this.#label("copied");
      setTimeout(this.#of(button).name, COPIED_FOR);
    };
    this.#name(button, () => (button.textContent = this.#label("copy")));
    element.className = "code";
    element.append(this.#create("div", "bar", language, button), pre);
    Object.assign(this.#of(element), { language, code, pre });
  }

  #showTable(block, old) {
    const element = this.#reuse(old, "table", "div", (made) => {
      const [head, body] = [this.#create("tr"), this.#create("tbody")];
      this.#makeScrollable(made, () => this.#label("table"));
      made.className = "table";
      made.append(this.#create("table", "", this.#create("thead", "", head), body));
      Object.assign(this.#of(made), { head, body });
    });
    const { head, body } = this.#of(element);
    this.#showRow(head, "th", block);
    this.#fill(body, block);
    return element;
  }

  #showRow(row, tag, { cells, alignments }) {
    cells.forEach((text, index) => {
      this.#place(row, index, (old) => this.#write(this.#reuse(old, tag, tag), text, { isCell: true }));
      row.childNodes[index].dataset.align = alignments[index];
    });
    trim(row, cells.length);
    return row;
  }

  /** Wide elements can be scrolled with the keyboard, too: they have a tab stop and a name. */
  #makeScrollable(element, name) {
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    this.#name(element, () => element.setAttribute("aria-label", name()));
  }

  #name(element, name) {
    this.#of(element).name = name;
    name();
  }

  /** Writes the text of a paragraph, a heading or a cell. */
  #write(element, text, { isDone, ...options } = {}) {
    const source = `${isDone}${options.isGrowing}${text}`;
    const state = this.#of(element);
    if (state.source === source) return element;
    state.source = source;
    const nodes = parseInlines(text, options);
    this.#writeNodes(element, isDone === undefined ? nodes : [{ tag: "input", isDone }, ...nodes]);
    return element;
  }

  #writeNodes(element, nodes) {
    nodes.forEach((node, index) => this.#place(element, index, (old) => this.#showNode(node, old)));
    trim(element, nodes.length);
  }

  #showNode(node, old) {
    if (typeof node === "string") {
      if (old?.nodeType !== TEXT) return this.#element.ownerDocument.createTextNode(node);
      setText(old, node);
      return old;
    }
    if (node.tag === "a") return this.#showLink(node, old);
    const element = this.#reuse(old, node.tag, node.tag);
    if (node.tag === "input") this.#showBox(element, node);
    else if (node.children) this.#writeNodes(element, node.children);
    return element;
  }

  /** A link, if its address is one that a page may offer; else its text, with the address as a hint. */
  #showLink({ href, title, isImage, children }, old) {
    const isSafe = SAFE_LINK.test(href);
    const element = this.#reuse(old, isSafe ? "link" : "text", isSafe ? "a" : "span");
    if (isSafe) Object.assign(element, { href, target: "_blank", rel: "noopener noreferrer" });
    element.className = isImage ? "image" : "";
    element.title = (isSafe ? title : `${href}${title ? ` "${title}"` : ""}`) ?? "";
    this.#writeNodes(element, children.length ? children : [href]);
    return element;
  }

  #showBox(element, { isDone }) {
    Object.assign(element, { type: "checkbox", disabled: true, checked: isDone });
    this.#name(element, () => element.setAttribute("aria-label", this.#label(isDone ? "taskDone" : "taskOpen")));
  }

  #markEnd() {
    let last = this.#element;
    while (last.lastElementChild && (last === this.#element || CONTAINERS.has(last.localName))) last = last.lastElementChild;
    if (last === this.#end) return;
    delete this.#end?.dataset.end;
    this.#end = last;
    last.dataset.end = "";
  }
}

function trim(element, count) {
  while (element.childNodes.length > count) element.lastChild.remove();
}

/** Changes a text node; a longer text only gets its end, so that a selection in it stays. */
function setText(node, text) {
  if (text.length > node.length && text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else if (node.data !== text) node.data = text;
}
