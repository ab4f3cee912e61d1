// Lists features that scripts use and the oldest browsers lack, by MDN's compatibility data: node compat.mjs FILE…
//
// TypeScript finds the type of each object. Without a type, a method is reported if no type has had one of this name for
// long enough. A call that is tested for (`text.toWellFormed?.()`) may be new.
import { readFileSync } from "node:fs";
import ts from "typescript";

const OLDEST = { chrome: "94", safari: "15.4" };
const { api, javascript } = JSON.parse(readFileSync(new URL("node_modules/@mdn/browser-compat-data/data.json", import.meta.url)));
const builtins = javascript.builtins;
const SYNTAX = [
  [/\(\?<[=!]/, "regular expressions: lookbehind", javascript.regular_expressions.lookbehind_assertion],
  [/\/[a-z]*v[a-z]*$/, "regular expressions: flag v", builtins.RegExp.unicodeSets],
];

const number = (version) => (typeof version === "string" ? parseFloat(version.replace("≤", "")) : version ? 0 : Infinity);

/** The browsers that lack a feature. */
function lacking(feature) {
  return Object.entries(OLDEST).filter(([browser, oldest]) => {
    const statements = [feature.__compat.support[browser]].flat();
    const usable = statements.filter((one) => !one.flags && !one.prefix && !one.alternative_name && !one.version_removed);
    return !usable.some((one) => number(one.version_added) <= number(oldest));
  });
}

/** Features with a name, by their type: Array → at. */
const types = new Map();
for (const [type, members] of [...Object.entries(builtins), ...Object.entries(api)]) {
  for (const [name, feature] of Object.entries(members)) {
    const plain = name.replace(/_(static|event)$/, "");
    if (!feature.__compat || name.endsWith("_event")) continue;
    if (!types.has(plain)) types.set(plain, new Map());
    types.get(plain).set(type, feature);
  }
}

function problemOfMember(name, owners) {
  const found = types.get(name);
  if (!found) return [];
  const exact = owners.map((owner) => found.get(owner)).filter(Boolean);
  const results = (exact.length ? exact : [...found.values()]).map(lacking);
  return results.some((one) => !one.length) ? [] : results[0]; // the best of those that it can be
}

function problems(program, file) {
  const checker = program.getTypeChecker();
  const found = [];
  const report = (node, what, browsers) => {
    const { line } = file.getLineAndCharacterOfPosition(node.getStart());
    if (browsers.length) found.push(`${line + 1}: ${what} is not in ${browsers.map((one) => one.join(" ")).join(", ")}`);
  };
  const isOurs = (declaration) => !program.isSourceFileDefaultLibrary(declaration.getSourceFile());
  const named = ({ parent }) => (ts.isTypeLiteralNode(parent) ? parent.parent : parent).name?.text;
  const owner = (declaration) => named(declaration)?.replace(/^Readonly(?=Array|Map|Set)|Constructor$/g, "") ?? "";
  const visit = (node) => {
    if (ts.isPropertyAccessExpression(node) && !(ts.isCallExpression(node.parent) && node.parent.questionDotToken)) {
      const declarations = checker.getSymbolAtLocation(node.name)?.declarations ?? [];
      const isGuess = !declarations.length;
      if (isGuess ? ts.isCallExpression(node.parent) && node.parent.expression === node && !ours.has(node.name.text) : !declarations.every(isOurs)) {
        report(node.name, node.name.text, problemOfMember(node.name.text, declarations.map(owner)));
      }
    } else if (ts.isIdentifier(node) && !ts.isPropertyAccessExpression(node.parent)) {
      const declarations = checker.getSymbolAtLocation(node)?.declarations ?? [];
      const feature = api[node.text] ?? builtins[node.text];
      if (feature?.__compat && declarations.length && !declarations.some(isOurs)) report(node, node.text, lacking(feature));
    } else if (ts.isRegularExpressionLiteral(node)) {
      for (const [pattern, what, feature] of SYNTAX) if (pattern.test(node.text)) report(node, what, lacking(feature));
    } else if (ts.isClassStaticBlockDeclaration(node)) {
      report(node, "a static block", lacking(javascript.classes.static.initialization_blocks ?? javascript.classes.static_initialization_blocks));
    }
    ts.forEachChild(node, visit);
  };
  visit(file);
  return found;
}

const files = process.argv.slice(2);
const ours = new Set(); // names of functions and methods in the files
const program = ts.createProgram(files, { allowJs: true, checkJs: true, noEmit: true, target: ts.ScriptTarget.ESNext, lib: ["lib.esnext.d.ts", "lib.dom.d.ts", "lib.dom.iterable.d.ts"], types: [] });
for (const file of files) {
  const collect = (node) => {
    if (ts.isFunctionLike(node) && node.name) ours.add(node.name.text);
    ts.forEachChild(node, collect);
  };
  collect(program.getSourceFile(file));
}
console.log(JSON.stringify(files.map((file) => problems(program, program.getSourceFile(file)))));
