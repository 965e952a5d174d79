// A task's own page: what was asked for, what happened, what it cost.

import { Card } from "./card.js";
import { stringify } from "./json.js";
import { element, quoted } from "./results.js";
import { clock, failure, instant, say, span } from "./words.js";

function section(title, ...content) {
  return element("section", {}, element("h3", { textContent: title }), ...content);
}

/** Rows of name and value; values that are missing are left out. */
function facts(rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", { className: "facts" }, ...shown.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

const text = (value) => (typeof value === "string" ? value : stringify(value));

function priceOf({ estimated, held, charged, returned }) {
  const known = (points) => points ?? say("detail.unknown");
  return say("detail.price.text", { estimated, held, charged: known(charged), returned: known(returned) });
}

function factsOf(task) {
  const ended = task.ended_at;
  return facts([
    [say("detail.id"), task.task_id],
    [say("detail.template"), task.template_id],
    [say("detail.priority"), say(`priority.${task.priority}`)],
    [say("detail.who"), task.user_id],
    [say("detail.when"), instant(task.created_at)],
    [say("detail.ended"), ended && instant(ended)],
    [say("detail.took"), ended && span((new Date(ended) - new Date(task.created_at)) / 1000)],
    [say("detail.attempts"), task.attempts],
    [say("detail.job"), task.job_id],
    [say("detail.price"), priceOf(task.credits)],
  ]);
}

function eventsOf(events) {
  return element("ol", { className: "events" }, ...events.map((event) => {
    const said = [event.stage && say(`stage.${event.stage}`), event.message && quoted(event.message), event.credits_delta && `${event.credits_delta > 0 ? "+" : ""}${event.credits_delta}`];
    return element("li", {}, element("time", { dateTime: event.ts, textContent: clock(event.ts) }), " ", element("code", { textContent: event.event }), ...said.filter(Boolean).flatMap((part, n) => [n ? " · " : " ", part]));
  }));
}

/** Fill `root` with the task. Returns its card. */
export function drawDetail(root, { task, events, log }, actions, links) {
  const card = new Card(task, actions, links, "h2");
  const parts = [
    element("ol", { className: "alone" }, card.item),
    section(say("detail.asked"), task.input ? facts(Object.entries(task.input).map(([name, value]) => [name, text(value)])) : element("p", { className: "quiet", textContent: say("detail.not_kept") })),
    section(say("detail.facts"), factsOf(task)),
    section(say("detail.events"), eventsOf(events)),
  ];
  if (log.length) parts.push(section(say("detail.log"), element("pre", { tabIndex: 0, lang: "en", textContent: log.map(({ ts, message }) => `${clock(ts)} ${message}`).join("\n") })));
  if (task.exceptions.length) {
    parts.push(section(say("detail.exceptions"), element("ul", {}, ...task.exceptions.map(({ code, message, ts }) => element("li", {}, `${clock(ts)} ${code}: ${failure(code, message)} `, quoted(message))))));
  }
  root.replaceChildren(...parts);
  return card;
}
