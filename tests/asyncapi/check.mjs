// Parses AsyncAPI documents with the parser of the AsyncAPI project. Prints a JSON array: for each file the number of its
// messages (0 for an invalid document), and the errors and warnings.
import { readFile } from "node:fs/promises";
import parser from "@asyncapi/parser";

const WARNING = 1;

async function check(path) {
  const { document, diagnostics } = await new parser.Parser().parse(await readFile(path, "utf8"));
  const problems = diagnostics.filter((one) => one.severity <= WARNING);
  return {
    messages: document?.allMessages().length ?? 0,
    problems: problems.map((one) => `${one.path.join(".")}: ${one.message}`),
  };
}

console.log(JSON.stringify(await Promise.all(process.argv.slice(2).map(check))));
