// Texts of about a length n that take long to read for a careless parser, which looks ahead or back again and again.

export const HOSTILE = {
  "open brackets": (n) => "[".repeat(n),
  "open and closed brackets": (n) => "[".repeat(n / 2) + "]".repeat(n / 2),
  "open images": (n) => "![".repeat(n / 2),
  "links without an end": (n) => "[a](".repeat(n / 4),
  "links with a pointed address without an end": (n) => "[a](<b".repeat(n / 6),
  "links with a title without an end": (n) => '[a](b "'.repeat(n / 7),
  "links within links": (n) => "[".repeat(n / 8) + "a" + "](b)".repeat(n / 5),
  "images within images": (n) => "![".repeat(n / 8) + "a" + "](b)".repeat(n / 5),
  "links after links": (n) => "[a](b)".repeat(n / 6),
  "addresses with open parentheses": (n) => `[a](${"(".repeat(n)}`,
  "titles of escapes": (n) => `[a](b "${"\\a".repeat(n / 2)}`,
  "titles in blanks": (n) => `[a](b${" ".repeat(n)}c`,
  "stars": (n) => "*".repeat(n),
  "stars around a letter": (n) => "*".repeat(n / 2) + "a" + "*".repeat(n / 2),
  "stars and letters": (n) => "*a".repeat(n / 2),
  "stars before letters": (n) => "*a ".repeat(n / 3),
  "stars that close": (n) => "a* ".repeat(n / 3),
  "stars that close behind underscores that open": (n) => "_a ".repeat(n / 6) + "a* ".repeat(n / 6),
  "stars of two lengths": (n) => "*a **b ".repeat(n / 7),
  "stars that open and close": (n) => "a**b".repeat(n / 4) + "c* ".repeat(n / 3),
  "stars and underscores in turn": (n) => "*_".repeat(n / 2) + "a" + "_*".repeat(n / 2),
  "strong and emphasis in turn": (n) => "*a __b ".repeat(n / 7),
  "tildes": (n) => "~~a ".repeat(n / 4),
  "backticks": (n) => "`".repeat(n),
  "backticks of growing lengths": (n) => Array.from({ length: Math.floor(Math.sqrt(2 * n)) }, (_, i) => "`".repeat(i)).join("a"),
  "backticks and letters": (n) => "`a``b".repeat(n / 5),
  "escapes": (n) => "\\*".repeat(n / 2),
  "backslashes": (n) => "\\".repeat(n),
  "entities without an end": (n) => "&a".repeat(n / 2),
  "tags without an end": (n) => "<a:".repeat(n / 3),
  "comments": (n) => "<!--".repeat(n / 4),
  "mail without an end": (n) => `<${"a".repeat(n)}`,
  "letters and an @": (n) => `${"a".repeat(n)}@`,
  "many @": (n) => "a@".repeat(n / 2),
  "mail in a row": (n) => "a@b.c".repeat(n / 5),
  "addresses": (n) => "http://a.b ".repeat(n / 11),
  "addresses in a row": (n) => "http://".repeat(n / 7),
  "addresses with bad names": (n) => "_www.a".repeat(n / 6),
  "addresses with closing parentheses": (n) => `http://a.b/${")".repeat(n)}`,
  "addresses with semicolons": (n) => `http://a.b/&${";".repeat(n)}`,
  "addresses with entities": (n) => `http://a.b/${"&a;".repeat(n / 3)}`,
  "addresses with dots": (n) => `http://${"a.".repeat(n / 2)}`,
  "addresses in brackets": (n) => `[${"http://a.b ".repeat(n / 11)}`,
  "quotes": (n) => ">".repeat(n),
  "quotes in many lines": (n) => `${"> ".repeat(30)}a\n`.repeat(n / 60),
  "items": (n) => "- ".repeat(n / 2),
  "items with numbers": (n) => "1. ".repeat(n / 3),
  "items in quotes": (n) => "> - ".repeat(n / 4),
  "nested items": (n) => Array.from({ length: Math.floor(Math.sqrt(n)) }, (_, i) => `${" ".repeat(2 * i)}- a\n`).join(""),
  "blanks": (n) => `a${" ".repeat(n)}b`,
  "blanks in a heading": (n) => `# a${" ".repeat(n)}b`,
  "marks in a heading": (n) => `# a${" #".repeat(n / 2)} b`,
  "blanks in a rule": (n) => `***${" ".repeat(n)}b`,
  "stars in a rule": (n) => `${"* ".repeat(n / 2)}b`,
  "blank lines": (n) => "\n".repeat(n),
  "blank lines in an item": (n) => `- a\n${"\n".repeat(n)}  b`,
  "lines of a paragraph": (n) => "a\n".repeat(n / 2),
  "lines with blanks at the end": (n) => "a  \n".repeat(n / 4),
  "carriage returns": (n) => "\r".repeat(n),
  "fences": (n) => "```\n".repeat(n / 4),
  "a fence that is nearly one": (n) => `\`\`\`${"a".repeat(n)}\``,
  "bars": (n) => "|".repeat(n),
  "a head with many cells": (n) => `${"a|".repeat(n / 4)}\n${"-|".repeat(n / 4)}\n`,
  "a head with many cells, and short rows": (n) => `${"a|".repeat(n / 6)}\n${"-|".repeat(n / 6)}\n${"a\n".repeat(n / 6)}`,
  "almost heads of tables": (n) => `a|b\n${"-|-|-\n".repeat(n / 6)}`,
  "blanks and bars": (n) => `a|b\n-${" ".repeat(n)}|x`,
  "headings of all levels": (n) => "# a\n## b\n### c\n".repeat(n / 15),
  "underlines": (n) => "a\n=\n".repeat(n / 4),
};

/** A text as models write it. */
export const ANSWER = `## Part

Some **words** with \`code\`, a [link](https://example.com/a_b "x") and *more*, until the line ends.

1. one
   - nested, with https://example.com/path
   - [x] done
2. two

   \`\`\`python
   print("hello")
   \`\`\`

| a | b |
|---|--:|
| 1 | **2** |

> quoted
> - in a list

`;
