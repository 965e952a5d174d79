// Fields of forms.

import { element } from "./results.js";
import { say } from "./words.js";

/** `{name}, +8 points`, or without points where it is free. */
export const priced = (key, name, points) => (points ? say(key, { name, n: points }) : name);

export const option = (value, textContent = value) => element("option", { value, textContent });

/** A label over its field. */
export function labelled(text, field, className = "") {
  return element("label", { className }, element("span", { textContent: text }), field);
}
