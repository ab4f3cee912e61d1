// Modules that count their steps: each call of a function and each turn of a loop. The same number on every machine.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import ts from "typescript";

globalThis.steps = 0;
const STEP = "globalThis.steps++";

function counted(source) {
  const insertions = [];
  const insert = (at, text) => insertions.push([at, text]);
  const visit = (node) => {
    const body = ts.isFunctionLike(node) ? node.body : ts.isIterationStatement(node, false) ? node.statement : undefined;
    if (body && ts.isBlock(body)) insert(body.getStart() + 1, `${STEP};`);
    else if (body) {
      const [before, after] = ts.isStatement(body) ? [`{${STEP};`, "}"] : [`(${STEP}, `, ")"];
      insert(body.getStart(), before);
      insert(body.end, after);
    }
    ts.forEachChild(node, visit);
  };
  visit(ts.createSourceFile("module.js", source, ts.ScriptTarget.ESNext, true));
  insertions.sort(([one], [other]) => other - one);
  return insertions.reduce((text, [at, more]) => text.slice(0, at) + more + text.slice(at), source);
}

/** Imports a module from a folder, counting its steps and those of its neighbours. */
export async function importCounted(folder, name) {
  const copy = mkdtempSync(join(tmpdir(), "counted-"));
  try {
    writeFileSync(join(copy, "package.json"), '{"type": "module"}');
    for (const file of readdirSync(folder).filter((one) => one.endsWith(".js"))) {
      writeFileSync(join(copy, file), counted(readFileSync(join(folder, file), "utf8")));
    }
    return await import(join(copy, name));
  } finally {
    rmSync(copy, { recursive: true });
  }
}
