// Compares imstream.d.ts (declared) with imstream.js (actual): compiled beside copies of both.
import * as actual from "./actual.js";
import type * as declared from "./declared.js";

// The code has everything that is declared, with these types.
export const same: typeof declared = actual;

// Everything of the code is declared.
type Undeclared<Actual, Declared> = Exclude<keyof Actual, keyof Declared>;
export const none: [
  Undeclared<typeof actual, typeof declared>,
  Undeclared<actual.Message, declared.Message>,
  Undeclared<actual.ImstreamClient, declared.ImstreamClient>,
  Undeclared<actual.Frame, declared.Frame>,
  Undeclared<actual.Options, declared.Options>,
  Exclude<actual.Status, declared.Status>,
  Exclude<declared.Status, actual.Status>,
  Exclude<actual.State, declared.State>,
  Exclude<declared.State, actual.State>,
] extends never[]
  ? true
  : false = true;
