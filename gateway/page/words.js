// What the page says: the strings of one language, and dates and numbers in its form.

import en from "./en.js";
import zh from "./zh.js";

const CHOSEN = "comfyui-temporal.language";
export const LANGUAGES = { en: "English", zh: "中文" };
const STRINGS = { en, zh };
const LOCALES = { en: undefined, zh: "zh-CN" };

/** Chosen by hand, else the first of the browser's that the page has. */
export const language = (() => {
  const chosen = localStorage.getItem(CHOSEN);
  if (chosen in STRINGS) return chosen;
  return navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in STRINGS) ?? "en";
})();

export function choose(wanted) {
  localStorage.setItem(CHOSEN, wanted);
  location.reload();
}

const locale = LOCALES[language] ?? (navigator.languages.find((tag) => tag.toLowerCase().startsWith(language)) || language);
const strings = STRINGS[language];
const numbers = new Intl.NumberFormat(locale);
const changes = new Intl.NumberFormat(locale, { signDisplay: "exceptZero" });
const percents = new Intl.NumberFormat(locale, { style: "percent" });
const times = new Intl.DateTimeFormat(locale, { timeStyle: "medium" });
const instants = new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "medium" });
const ago = new Intl.RelativeTimeFormat(locale, { numeric: "auto", style: "short" });

/** The string of a key, `{name}` replaced. A word that the page has no string for, such as a new status, stays as it is. */
export function say(key, values = {}) {
  const text = (values.n === 1 && strings[`${key}.one`]) || (strings[key] ?? key.slice(key.indexOf(".") + 1));
  return text.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? numbers.format(values[name]) : values[name]));
}

/** A failure's sentence, for whoever does not read the platform's own: it is English, and says more. */
export function failure(code, sentence) {
  const key = `failure.${code}`;
  return key in strings && (language !== "en" || !sentence) ? say(key) : "";
}

export const points = (change) => say("detail.points", { change: changes.format(change) });
export const percent = (part) => percents.format(part);
export const clock = (at) => times.format(new Date(at));
export const instant = (at) => instants.format(new Date(at));

/** 4:05, or 1:02:03. */
export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor(whole / 60) % 60, whole % 60];
  const hours = Math.floor(whole / 3600);
  if (hours) parts.unshift(hours);
  return parts.map((part, n) => (n ? String(part).padStart(2, "0") : part)).join(":");
}

/** "3 min ago". */
export function since(at) {
  const seconds = (Date.now() - new Date(at)) / 1000;
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (seconds >= size) return ago.format(-Math.floor(seconds / size), unit);
  }
  return ago.format(0, "second");
}

/** Fill in the strings of `data-say`, and attributes of `data-say-{attribute}`. */
export function fill(root) {
  document.documentElement.lang = language;
  document.title = say("title");
  for (const element of root.querySelectorAll("[data-say]")) element.append(say(element.dataset.say));
  for (const name of ["placeholder", "aria-label"]) {
    for (const element of root.querySelectorAll(`[data-say-${name}]`)) element.setAttribute(name, say(element.getAttribute(`data-say-${name}`)));
  }
}
