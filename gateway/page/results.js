// A task's results: pictures, video and audio on its card, and one of them large.

import { say } from "./words.js";

const VIDEO = /\.(mp4|webm|mov|m4v)$/i;
const BRIDGE_FILES = /\/comfyui\/files\//;
const WIDTHS = [512, 1024];
const CARD_SIZES = "(max-width: 42rem) 92vw, 26rem";
const AUDIO = /\.(mp3|wav|ogg|flac|m4a)$/i;

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** What the platform said, in its own words: they are English in every language of the page. */
export const quoted = (text) => element("span", { lang: "en", textContent: text });

/** A button with a name of its own for screen readers. */
export function button(text, label, act, className = "plain") {
  const made = element("button", { type: "button", className, textContent: text, onclick: act });
  if (label) made.setAttribute("aria-label", label);
  return made;
}

/** The address if it is http or https, else null. */
export function webAddress(text) {
  try {
    const address = new URL(text);
    return ["http:", "https:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

/** The name of the file at an address, which may be none. */
export function fileOf(text) {
  const name = String(text).split(/[?#]/)[0].split("/").pop();
  try {
    return decodeURIComponent(name);
  } catch {
    return name;
  }
}

function kindOf(address) {
  const { pathname, searchParams } = new URL(address);
  const name = searchParams.get("filename") ?? pathname;
  return VIDEO.test(name) ? "video" : AUDIO.test(name) ? "audio" : "img";
}

/** What stands where a result cannot be loaded. */
function broken(address) {
  const link = element("a", { href: address, target: "_blank", rel: "noreferrer", textContent: say("result.broken.open") });
  return element("p", { className: "broken" }, element("span", { textContent: say("result.broken") }), " ", link);
}

/** The bridge's own addresses give a picture in these widths (bridge/thumbnails.py); others are left as they are. */
function small(address) {
  const given = new URL(address);
  if (!BRIDGE_FILES.test(given.pathname)) return {};
  const of = (width) => {
    given.searchParams.set("width", width);
    return `${given.href} ${width}w`;
  };
  return { sizes: CARD_SIZES, srcset: WIDTHS.map(of).join(", ") };
}

function media(address, alt, large) {
  const kind = kindOf(address);
  const made = element(kind);
  if (kind === "img") Object.assign(made, { alt, loading: large ? "eager" : "lazy", decoding: "async", referrerPolicy: "no-referrer" }, large ? {} : small(address));
  else Object.assign(made, { controls: true, preload: "metadata", ariaLabel: alt });
  // Last: whatever is set after it would begin another load.
  made.src = address;
  return made;
}

/** Draw results into `list`; `open(n)` shows one large. */
export function drawResults(list, addresses, taskId, open) {
  const known = addresses.join("\n");
  if (list.dataset.known === known) return;
  list.dataset.known = known;
  list.dataset.count = Math.min(addresses.length, 4);
  list.replaceChildren(...addresses.map((address, n) => {
    const made = media(address, say("result.alt", { n: n + 1, task: taskId }), false);
    const shown = made.localName === "img" ? button("", say("result.open", { n: n + 1, task: taskId }), () => open(n), "picture") : made;
    if (shown !== made) shown.append(made);
    const item = element("li", {}, shown);
    made.onerror = () => item.replaceChildren(broken(address));
    return item;
  }));
}

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Pages by plain http, but for this machine's, have no clipboard.
  const field = element("textarea", { value: text });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** Copy, and say so on the button for a moment. */
export async function copy(from, text) {
  await copyText(text);
  const before = from.textContent;
  from.textContent = say("copied");
  setTimeout(() => (from.textContent = before), 1500);
}

/** The large view: a dialog that returns focus by itself. `actions`: buttons of the task. */
export class Large {
  #dialog = document.getElementById("large");
  #addresses = [];
  #at = 0;

  constructor() {
    this.#dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowRight") this.#show(this.#at + 1);
      if (key === "ArrowLeft") this.#show(this.#at - 1);
    });
    this.#dialog.onclick = ({ target }) => target === this.#dialog && this.#dialog.close();
  }

  open(card, addresses, n) {
    this.#addresses = addresses;
    this.card = card;
    this.#show(n);
    this.#dialog.showModal();
  }

  #show(n) {
    const all = this.#addresses.length;
    this.#at = (n + all) % all;
    const address = this.#addresses[this.#at];
    const { task } = this.card;
    const shown = media(address, say("result.alt", { n: this.#at + 1, task: task.task_id }), true);
    const stage = element("div", { className: "stage" }, shown);
    shown.onerror = () => stage.replaceChildren(broken(address));
    const copying = button(say("action.copy_link"), null, () => copy(copying, address));
    const download = element("a", { className: "button plain", href: address, download: "", target: "_blank", rel: "noreferrer", textContent: say("action.download") });
    const turning = all > 1 ? [button(say("action.previous"), null, () => this.#show(this.#at - 1)), button(say("action.next"), null, () => this.#show(this.#at + 1))] : [];
    const close = button(say("action.close"), null, () => this.#dialog.close(), "");
    close.autofocus = true;
    this.#dialog.setAttribute("aria-label", say("result.large", { n: this.#at + 1, all }));
    this.#dialog.replaceChildren(
      stage,
      element("p", { className: "quiet", textContent: task.input?.prompt ?? task.task_id }),
      element("p", { className: "actions" }, ...turning, download, copying, ...this.card.runButtons(() => this.#dialog.close()), close),
    );
    if (this.#dialog.open) close.focus();
  }
}
