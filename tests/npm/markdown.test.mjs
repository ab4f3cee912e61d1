// Properties of the page's Markdown beyond the specifications: it is safe, does not depend on the pieces in which a text
// arrives, and does not parse finished blocks again.
import assert from "node:assert/strict";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { importCounted } from "./counted.mjs";
import { ANSWER, HOSTILE } from "./markdown_hostile.mjs";
import { makeView, outline, show, toHtml } from "./markdown_support.mjs";

const html = (text) => show(text).childNodes.map(toHtml).join("");

/** Numbers from 0 to 1, the same ones in every run. */
function randomFrom(seed) {
  return () => {
    seed = (seed * 1664525 + 1013904223) % 2 ** 32;
    return seed / 2 ** 32;
  };
}

const STATIC = fileURLToPath(new URL("../../imstream/gateway/static", import.meta.url));
const counting = await importCounted(STATIC, "markdown.js");

/** The steps of updating a view that shows a text. */
function stepsOf(before, ...texts) {
  const { view } = makeView({}, counting);
  view.update(before);
  globalThis.steps = 0;
  for (const text of texts) view.update(text);
  return globalThis.steps;
}

/** The steps of showing what follows a text, character by character. */
function stepsAfter(text, more) {
  return stepsOf(text, ...Array.from(more, (_, index) => text + more.slice(0, index + 1)));
}

const PIECES = [
  "\n", "\n\n", "- a\n\n- b", "\n\n  c", "  ", "    ", "\t", "- ", "* ", "1. ", "2) ", "> ", "# ", "### ", "```", "````", "~~~", "```js\n", "---", "===", "***", "*", "**", "_",
  "~~", "`", "``", "[", "](", "](https://a.b)", ")", "!", "<", ">", "|", "| a | b |\n|---|:-:|\n", "a|b\n-|-\n", "\\", "&amp;", "- [ ] ", "- [x] t", "https://a.b/c",
  "www.a.b", "a@b.cd", "<br>", "word", "two words", "中文", "“引”", "。", "1", "2024", ".", "\r\n", "\r", "  \n", "\\\n", "\u00a0", "😀",
];

test("the shown content depends on the text, not on its pieces", () => {
  const random = randomFrom(7);
  const pick = () => PIECES[Math.floor(random() * PIECES.length)];
  for (let round = 0; round < (process.env.MARKDOWN_ROUNDS ?? 60); round++) {
    const text = Array.from({ length: 1 + Math.floor(random() * 40) }, pick).join("");
    const { element, view } = makeView();
    for (let end = 0; end < text.length; ) {
      end = Math.min(text.length, end + 1 + Math.floor(random() * 9));
      const done = end === text.length;
      const once = makeView();
      once.view.update(text.slice(0, end), { done });
      view.update(text.slice(0, end), { done });
      assert.equal(outline(element), outline(once.element), JSON.stringify(text.slice(0, end)));
    }
  }
});

test("an answer is shown as far as it came, and line endings are all the same", () => {
  for (const text of [ANSWER, ANSWER.replace(/\n/g, "\r\n"), ANSWER.replace(/\n/g, "\r")]) {
    const { element, view } = makeView();
    for (let end = 0; end <= text.length; end++) {
      const once = makeView();
      once.view.update(text.slice(0, end));
      view.update(text.slice(0, end));
      assert.equal(outline(element), outline(once.element), JSON.stringify(text.slice(0, end)));
    }
    assert.equal(outline(element), outline(show(ANSWER)));
  }
});

test("a text that is not the last one with more at its end is shown from the beginning", () => {
  const { element, view } = makeView();
  view.update("# An attempt\n\n- that was given up");
  view.update("Another", { done: true });
  assert.equal(outline(element), outline(show("Another")));
  view.update("Another", { done: false });
  view.update("Another one", { done: true });
  assert.equal(outline(element), outline(show("Another one")));
});

test("elements of blocks that are finished are kept, and the unfinished ones are changed in place", () => {
  const { element, view } = makeView();
  const text = ANSWER.repeat(3);
  let before = [];
  for (let end = 0; end < text.length; end++) {
    view.update(text.slice(0, end));
    const now = element.childNodes.slice(0, -2);
    before.slice(0, now.length).forEach((child, index) => assert.equal(now[index], child));
    before = now;
  }
});

test("a delta of a long answer takes as many steps as one of a short answer", () => {
  const [short, long] = [3, 100].map((count) => stepsAfter(ANSWER.repeat(count), ANSWER));
  assert.ok(short > 10_000 && long < 1.05 * short, `${short} and ${long}`);
});

for (const [name, head, line] of [
  ["code", "```\n", "a line of code\n"],
  ["list", "", "- an *item*\n  - with another\n"],
  ["table", "|a|b|\n|-|-|\n", "|c|**d**|\n"],
  ["quote", "", "> a\n>\n"],
]) {
  test(`a delta at the end of a long ${name} takes as many steps as at its beginning`, () => {
    const [short, long] = [30, 1000].map((count) => stepsAfter(head + line.repeat(count), line));
    assert.ok(short > 100 && long < 1.05 * short, `${short} and ${long}`);
  });
}

test("hostile texts of twice the length take twice the steps", () => {
  for (const [name, make] of Object.entries(HOSTILE)) {
    const [one, two] = [2000, 4000].map((length) => stepsOf("", `${make(length)}\n`));
    assert.ok(two < 2.2 * one + 200, `${name}: ${one} and ${two}`);
  }
});

test("a piece at the end of a hostile text takes no more steps than the whole text", () => {
  for (const [name, make] of Object.entries(HOSTILE)) {
    const text = make(2000);
    const [whole, piece] = [stepsOf("", `${text}a`), stepsOf(text, `${text}a`)];
    assert.ok(piece < 1.2 * whole + 200, `${name}: ${whole} and ${piece}`);
  }
});

test("addresses are links only if they begin with http, https or mailto", () => {
  const links = (element) => element.getElementsByTagName("a").map(({ href, target, rel }) => [href, target, rel]);
  for (const address of ["https://a.b", "HTTP://a.b", "mailto:a@b.c"]) {
    const wanted = [[address, "_blank", "noopener noreferrer"]];
    assert.deepEqual(links(show(`[a](${address})`)), wanted);
    assert.deepEqual(links(show(`<${address}>`)), wanted);
    assert.deepEqual(links(show(`![a](<${address}>)`)), wanted);
  }
  const bad = [
    "javascript:alert(1)", "JavaScript:alert(1)", "java\tscript:alert(1)", "java&Tab;script:alert(1)", "&#106;avascript:alert(1)", "\\javascript:alert(1)",
    "\u0001javascript:alert(1)", "data:text/html,<script>alert(1)</script>", "vbscript:msgbox(1)", "file:///etc/passwd", "blob:https://a.b/c",
    "//a.b", "/a", "a", "", "#a", "?a", "https:a", "https:/a", "http:\\\\a.b", "xmpp:a@b.c", "view-source:https://a.b", "https&colon;//a.b", "intent://a.b#Intent;end",
  ];
  for (const address of bad) {
    for (const text of [`[a](${address})`, `[a](<${address}>)`, `<${address}>`, `![a](${address})`, `[![a](${address})](${address})`]) {
      const refused = links(show(text)).filter(([href]) => !/^(?:https?:\/\/a\.b|mailto:a@b\.c)/.test(href));
      assert.deepEqual(refused, [], text);
    }
  }
});

test("an address that is no link is shown as a hint", () => {
  assert.equal(html('[the file](src/main.py "a title")'), '<p><a href="src/main.py" title="a title">the file</a></p>');
  const [hint] = show("[the file](src/main.py)").getElementsByTagName("span");
  assert.deepEqual([hint.title, hint.textContent], ["src/main.py", "the file"]);
});

test("no entity turns the direction of a text", () => {
  for (const entity of ["&#x202e;", "&#8238;", "&#x202A;", "&#x2066;", "&#8295;"]) {
    const text = `a${entity}b [c${entity}d](https://a.b/${entity} "${entity}") \`\`\`\n${entity}\n\n| ${entity} |\n|-|`;
    assert.doesNotMatch(outline(show(text)), /[\u202a-\u202e\u2066\u2067]/);
  }
});

test("only these elements are ever built, whatever the text", () => {
  const allowed = new Set("a blockquote br button code del div em h3 h4 h5 h6 hr input li ol p pre span strong table tbody td th thead tr ul".split(" "));
  const random = randomFrom(11);
  const more = [...PIECES, "<script>", "<img src=x onerror=alert(1)>", "<style>", "javascript:alert(1)", "</code>", "<a href='javascript:alert(1)'>"];
  const names = (node) => [node.localName, ...node.children.flatMap(names)];
  for (let round = 0; round < 100; round++) {
    const text = Array.from({ length: 40 }, () => more[Math.floor(random() * more.length)]).join("");
    for (const name of show(text).children.flatMap(names)) assert.ok(allowed.has(name), `${name}: ${JSON.stringify(text)}`);
  }
});

test("elements are nested to a limit, and no text is lost beyond it", () => {
  const depth = (node) => 1 + Math.max(0, ...node.children.map(depth));
  for (const [before, after] of [[">"], ["- "], ["> 1. "], ["*a **b ", " c** d*"], ["![*a ", "*](e)"]]) {
    const element = show(`${before.repeat(5000)}END${(after ?? "").repeat(5000)}`);
    assert.ok(depth(element) > 10 && depth(element) < 60, `${depth(element)} for ${before}`);
    assert.ok(element.textContent.includes("END"));
  }
});

test("the levels of headings follow from the outline and skip none", () => {
  const levels = (text) => show(text).children.map(({ localName }) => localName).join(" ");
  assert.equal(levels("#### a\n# b\n### c\n## d\n#### e"), "h3 h3 h4 h4 h5");
  assert.equal(levels("# a\n## b\n### c\n#### d\n##### e\n###### f"), "h3 h4 h5 h6 h6 h6");
});

test("marks that may become anything are not shown before they have become something", () => {
  const shown = (text) => {
    const { element, view } = makeView();
    view.update(text);
    return element.childNodes.map(toHtml).join("");
  };
  assert.equal(shown("Steps:\n-"), "<p>Steps:</p>");
  assert.equal(shown("Steps:\n1."), "<p>Steps:</p>");
  assert.equal(shown("Code:\n``"), "<p>Code:</p>");
  assert.equal(shown("Table:\n\n| a | b"), "<p>Table:</p>");
  assert.equal(shown("Table:\n\n| a | b |\n|--"), "<p>Table:</p>");
  assert.equal(shown("Table:\n\n| a | b |\n|--|--|\n"), "<p>Table:</p><table><thead><tr><th>a</th><th>b</th></tr></thead></table>");
  assert.equal(html("Table:\n\n| a | b"), "<p>Table:</p><p>| a | b</p>");
});

test("emphasis, code and links that have begun are shown before they have ended", () => {
  const shown = (text) => {
    const { element, view } = makeView();
    view.update(text);
    return element.childNodes.map(toHtml).join("");
  };
  assert.equal(shown("a **b"), "<p>a <strong>b</strong></p>");
  assert.equal(shown("a *b **c"), "<p>a <em>b <strong>c</strong></em></p>");
  assert.equal(shown("- a ~~b `c"), "<ul><li>a <del>b <code>c</code></del></li></ul>");
  assert.equal(shown("a [b](https://c.d/e"), '<p>a <a href="https://c.d/e">b</a></p>');
  assert.equal(shown("a **"), "<p>a </p>");
  assert.equal(shown("a `c](d"), "<p>a <code>c](d</code></p>");
  assert.equal(shown("2 * 3, a*b, **c** d"), "<p>2 * 3, a*b, <strong>c</strong> d</p>");
  for (const end of ["\n\n", "\n# d"]) assert.match(shown(`a **b \`c${end}`), /^<p>a \*\*b `c<\/p>/);
  assert.equal(html("a **b `c [d](e"), "<p>a **b `c [d](e</p>");
});

test("emphasis begins and ends between Chinese characters and punctuation", () => {
  assert.equal(html("**注意：**请看"), "<p><strong>注意：</strong>请看</p>");
  assert.equal(html("他说**“好”**了"), "<p>他说<strong>“好”</strong>了</p>");
  assert.equal(html("3~5个，5~10个"), "<p>3~5个，5~10个</p>");
  assert.equal(html("请看https://example.com/a。谢谢"), '<p>请看<a href="https://example.com/a">https://example.com/a</a>。谢谢</p>');
});

test("addresses end where a sentence or a mark goes on", () => {
  const links = (text) => show(text).getElementsByTagName("a").map(({ href }) => href);
  assert.deepEqual(links("**https://a.b/c_d_e**, (https://a.b/f), https://a.b/g_(h)."), ["https://a.b/c_d_e", "https://a.b/f", "https://a.b/g_(h)"]);
  assert.deepEqual(links("[https://a.b](https://a.b) [see https://c.d/_e_]"), ["https://a.b", "https://c.d/_e_"].slice(0, 1).concat("https://c.d/"));
  assert.deepEqual(links("http://localhost:8080/x a@b.c me@localhost"), ["http://localhost:8080/x", "mailto:a@b.c"]);
  assert.deepEqual(links("`https://a.b`"), []);
});

test("code has its language, and a button that copies it as it is", async () => {
  const copied = [];
  const { element, view } = makeView({ copy: (text) => copied.push(text) });
  view.update("- a\n  ```c++ title\n  x\n\n    y\n  ```\n", { done: true });
  const [code] = element.getElementsByTagName("pre");
  const [button] = element.getElementsByTagName("button");
  assert.equal(code.parentNode.firstChild.firstChild.textContent, "c++");
  const { setTimeout } = globalThis;
  let later;
  globalThis.setTimeout = (work) => (later = work);
  await button.onclick();
  globalThis.setTimeout = setTimeout;
  assert.deepEqual([copied, button.textContent], [["x\n\n  y"], "copied"]);
  later();
  assert.equal(button.textContent, "copy");
});

test("scrollable elements have a tab stop and a name, and names change with the language", () => {
  let language = "en";
  const { element, view } = makeView({ label: (name) => `${language} ${name}` });
  view.update("```js\nx\n```\n|a|\n|-|\n\n- [x] b\n", { done: true });
  const named = () => {
    const [code, table] = [element.getElementsByTagName("pre")[0], element.getElementsByTagName("table")[0].parentNode];
    assert.deepEqual([code.tabIndex, table.tabIndex], [0, 0]);
    const [box, button] = ["input", "button"].map((tag) => element.getElementsByTagName(tag)[0]);
    return [code, table, box].map(({ attributes }) => attributes["aria-label"]).concat(button.textContent);
  };
  assert.deepEqual(named(), ["en code js", "en table", "en taskDone", "en copy"]);
  language = "zh";
  view.relabel();
  assert.deepEqual(named(), ["zh code js", "zh table", "zh taskDone", "zh copy"]);
});

test("a line can be broken in a cell", () => {
  assert.match(html("|a|\n|-|\n|b<br>c<br/>d|\n"), /<td>b<br \/>c<br \/>d<\/td>/);
  assert.equal(html("b<br>c"), "<p>b&lt;br&gt;c</p>");
});
