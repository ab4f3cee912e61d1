// Shows Markdown in Node.js, and writes what is shown as HTML.
import * as markdown from "../../imstream/gateway/static/markdown.js";
import { makeDocument } from "./dom.mjs";

/** A view on an empty element. */
export function makeView(options = {}, { MarkdownView } = markdown) {
  const element = makeDocument().createElement("div");
  return { element, view: new MarkdownView(element, { label: (name) => name, copy: () => {}, ...options }) };
}

/** The element with a text that is complete. */
export function show(text) {
  const { element, view } = makeView();
  view.update(text, { done: true });
  return element;
}

/** All that a person can notice of an element. */
export function outline(node) {
  if (node.nodeType === 3) return JSON.stringify(node.data);
  const { localName, className, href, title, start, checked, dataset, attributes } = node;
  const facts = JSON.stringify({ className, href, title, start, checked, ...dataset, ...attributes });
  return `${localName}${facts}(${node.childNodes.map(outline).join()})`;
}

const escaped = (text) => text.replace(/[&<>"]/g, (mark) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[mark]);
const attribute = (name, value) => (value === undefined || value === "" ? "" : ` ${name}="${escaped(String(value))}"`);
const inner = (node) => node.childNodes.map(toHtml).join("");
const SIDES = { start: "left", center: "center", end: "right" };

/** HTML as the specifications write it, where what we build is different on purpose but means the same. */
export function toHtml(node) {
  if (node.nodeType === 3) return escaped(node.data);
  const { localName: tag, className, parentNode } = node;
  if (tag === "div") return className === "code" ? codeHtml(node) : tableHtml(node);
  if (tag === "p" && parentNode.localName === "li" && parentNode.parentNode.className !== "loose") return inner(node);
  if (tag === "br" || tag === "hr") return `<${tag} />`;
  if (tag === "input") return `<input${node.checked ? ' checked=""' : ""} disabled="" type="checkbox"> `;
  if (tag === "ol") return `<ol${node.start === 1 ? "" : attribute("start", node.start)}>${inner(node)}</ol>`;
  if (tag === "a" || tag === "span") {
    // An address that we do not link is a hint.
    const [, href, title] = tag === "a" ? ["", node.href, node.title] : /^([^]*?)(?: "([^]*)")?$/.exec(node.title);
    const place = encodeURI(href).replace(/%25([0-9A-F]{2})/gi, "%$1");
    if (className === "image") return `<img src="${escaped(place)}" alt="${escaped(node.textContent)}"${attribute("title", title)} />`;
    return `<a href="${escaped(place)}"${attribute("title", title)}>${inner(node)}</a>`;
  }
  const name = node.dataset.level ? `h${node.dataset.level}` : tag; // the outline decides the level
  return `<${name}${attribute("align", SIDES[node.dataset.align])}>${inner(node)}</${name}>`;
}

function codeHtml(node) {
  const [bar, pre] = node.childNodes;
  const code = pre.textContent;
  const language = bar.firstChild.textContent;
  return `<pre><code${attribute("class", language && `language-${language}`)}>${escaped(code)}</code></pre>`;
}

/** A row that is too short has no empty cells, and a table without rows has an empty body. */
function tableHtml(node) {
  const [head, body] = node.firstChild.childNodes;
  return `<table>${toHtml(head)}${body.childNodes.length ? toHtml(body) : ""}</table>`;
}

/** The expected HTML without what makes no difference: line breaks between blocks, the last one of code, empty cells. */
export function simplified(html) {
  return html
    .replace(/\n*(<\/?(?:p|ul|ol|li|blockquote|h\d|hr|pre|table|thead|tbody|tr|t[dh])\b[^>]*>)\n*/g, "$1")
    .replace(/\n<\/code><\/pre>/g, "</code></pre>")
    .replace(/<br \/>\n/g, "<br />")
    .replace(/(?:<td[^>]*><\/td>)+<\/tr>/g, "</tr>")
    .trim();
}
