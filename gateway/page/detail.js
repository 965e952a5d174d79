// A task's own page: what was asked for, what happened, what it cost.

import { Card } from "./card.js";
import { stringify } from "./json.js";
import { element, quoted } from "./results.js";
import { clock, failure, instant, percent, points, say, span } from "./words.js";

function section(title, ...content) {
  return element("section", {}, element("h3", { textContent: title }), ...content);
}

/** Rows of name and value; values that are missing are left out. */
function facts(rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", { className: "facts" }, ...shown.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

/** An input's fields as the form names them; any other keeps its own name. */
const NAMES = {
  prompt: "start.prompt", negative_prompt: "start.negative_prompt", resolution: "start.resolution", images: "start.images",
  seed: "start.seed", extras: "start.extras", loras: "start.loras", controls: "start.controls", base_model: "start.base_model",
  dataset: "start.dataset", dataset_id: "start.dataset.id", source_uri: "start.dataset.address", max_credits: "start.limit",
  hyperparameters: "detail.hyperparameters", epochs: "start.epochs", batch_size: "start.batch_size", learning_rate: "start.learning_rate",
};
const FACTS_HAVE = ["template_id", "priority"];
const nameOf = (name) => (name in NAMES ? say(NAMES[name]) : name);
const isGiven = (value) => value !== null && value !== undefined && value !== "" && !(typeof value === "object" && !Object.keys(value).length);

/** A value for people: what an object holds line by line, and what a list holds one after the other. */
function text(value) {
  if (Array.isArray(value)) return value.map(text).join("\n");
  if (typeof value !== "object" || value === null) return typeof value === "string" ? value : stringify(value);
  return Object.entries(value).filter(([, part]) => isGiven(part)).map(([name, part]) => `${nameOf(name)}: ${text(part)}`).join("\n");
}

function askedFor(input) {
  return facts(Object.entries(input).filter(([name, value]) => isGiven(value) && !FACTS_HAVE.includes(name)).map(([name, value]) => [nameOf(name), text(value)]));
}

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
    const stage = event.stage && say(`stage.${event.stage}`);
    const isMoving = stage && event.event === "task.running" && event.progress > 0;
    const said = [isMoving ? `${stage} ${percent(event.progress / 100)}` : stage, event.message && quoted(event.message), event.credits_delta && points(event.credits_delta)];
    return element("li", {}, element("time", { dateTime: event.ts, textContent: clock(event.ts) }), " ", element("code", { textContent: event.event }), ...said.filter(Boolean).flatMap((part, n) => [n ? " · " : " ", part]));
  }));
}

/** How many older ones are not shown. */
const leftOut = ({ leftOut: n }) => (n ? [element("p", { className: "quiet", textContent: say("detail.left_out", { n }) })] : []);

/** Fill `root` with the task. Returns its card. */
export function drawDetail(root, { task, history, log }, actions, links) {
  const card = new Card(task, actions, links, "h2");
  const parts = [
    element("ol", { className: "alone" }, card.item),
    section(say("detail.asked"), task.input ? askedFor(task.input) : element("p", { className: "quiet", textContent: say("detail.not_kept") })),
    section(say("detail.facts"), factsOf(task)),
    section(say("detail.events"), ...leftOut(history), eventsOf(history.events)),
  ];
  if (log.lines.length) parts.push(section(say("detail.log"), ...leftOut(log), element("pre", { tabIndex: 0, lang: "en", textContent: log.lines.map(({ ts, message }) => `${clock(ts)} ${message}`).join("\n") })));
  if (task.exceptions.length) {
    parts.push(section(say("detail.exceptions"), element("ul", {}, ...task.exceptions.map(({ code, message, ts }) => element("li", {}, `${clock(ts)} ${code}: ${failure(code, message)} `, quoted(message))))));
  }
  root.replaceChildren(...parts);
  return card;
}
