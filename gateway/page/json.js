// JSON whose whole numbers stay exact: a seed has up to 64 bits, a number of JavaScript 53. Larger ones are BigInt.

// No text of the gateway holds NUL, so a marked number is never mistaken for a text.
const MARK = "\u0000";
const MAY_BE_LARGE = /\d{16}/;
const TEXT_OR_NUMBER = /"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*/g;
const LARGE = /^-?\d{16,}$/;
const MARKED = /"\\u0000(-?\d+)"/g;

export function parse(text) {
  if (!MAY_BE_LARGE.test(text)) return JSON.parse(text);
  const marked = text.replace(TEXT_OR_NUMBER, (part) => (LARGE.test(part) && !Number.isSafeInteger(Number(part)) ? `"\\u0000${part}"` : part));
  return JSON.parse(marked, (_, value) => (typeof value === "string" && value[0] === MARK ? BigInt(value.slice(1)) : value));
}

export function stringify(value) {
  const written = JSON.stringify(value, (_, part) => (typeof part === "bigint" ? MARK + part : part));
  return written?.replace(MARKED, "$1");
}

/** A whole number as it was typed. */
export function integer(text) {
  const number = Number(text);
  return Number.isSafeInteger(number) || !/^-?\d+$/.test(text) ? number : BigInt(text);
}
