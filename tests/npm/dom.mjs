// As much of the DOM as the page's Markdown needs, to run it in Node.js. Counts the nodes that were made.

class Node {
  parentNode = null;

  remove() {
    const siblings = this.parentNode?.childNodes;
    siblings?.splice(siblings.indexOf(this), 1);
    this.parentNode = null;
  }

  replaceWith(other) {
    const { parentNode } = this;
    other.remove();
    parentNode.childNodes[parentNode.childNodes.indexOf(this)] = other;
    other.parentNode = parentNode;
    this.parentNode = null;
  }
}

class Text extends Node {
  nodeType = 3;

  constructor(data) {
    super();
    this.data = data;
  }

  get length() {
    return this.data.length;
  }

  get textContent() {
    return this.data;
  }

  appendData(more) {
    this.data += more;
  }
}

export class Element extends Node {
  nodeType = 1;
  childNodes = [];
  className = "";
  dataset = {};
  attributes = {};

  constructor(ownerDocument, localName) {
    super();
    Object.assign(this, { ownerDocument, localName });
  }

  get children() {
    return this.childNodes.filter(({ nodeType }) => nodeType === 1);
  }

  get firstChild() {
    return this.childNodes[0] ?? null;
  }

  get lastChild() {
    return this.childNodes[this.childNodes.length - 1] ?? null;
  }

  get lastElementChild() {
    let at = this.childNodes.length;
    while (at && this.childNodes[at - 1].nodeType !== 1) at--;
    return this.childNodes[at - 1] ?? null;
  }

  get textContent() {
    return this.childNodes.map((node) => node.textContent).join("");
  }

  set textContent(text) {
    this.replaceChildren(...(text ? [this.ownerDocument.createTextNode(text)] : []));
  }

  append(...nodes) {
    for (const node of nodes) {
      node.remove();
      node.parentNode = this;
      this.childNodes.push(node);
    }
  }

  replaceChildren(...nodes) {
    for (const node of this.childNodes) node.parentNode = null;
    this.childNodes = [];
    this.append(...nodes);
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  getElementsByTagName(name) {
    return this.children.flatMap((child) => [...(child.localName === name ? [child] : []), ...child.getElementsByTagName(name)]);
  }
}

export function makeDocument() {
  const document = {
    made: 0,
    createElement: (name) => (document.made++, new Element(document, name)),
    createTextNode: (data) => (document.made++, new Text(data)),
  };
  return document;
}
