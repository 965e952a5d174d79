// One task on the page. Foreign text is inserted as text only; an address becomes a link only with http or https.

import { drawLosses, lossesOf } from "./loss.js";
import { button, copy, drawResults, element, fileOf, quoted, webAddress } from "./results.js";
import { clock, failure, instant, percent, say, since, span } from "./words.js";

export { webAddress };

/** The stages of a whole task, each with its part of it in percent. */
const STAGES = {
  "image.generate": [["queued", 10], ["processing", 80], ["delivery", 10]],
  "model.train": [["data_ingest", 10], ["training", 75], ["evaluating", 10], ["publishing", 5]],
};
const ENDS = ["completed", "failed", "cancelled"];
const ENDS_OF = { "task.completed": "completed", "task.failed": "failed", "task.cancelled": "cancelled" };
const MAX_SEED = 2 ** 32;

/** How far the whole task is, 0 to 1. */
export function wholeOf({ scene, status, stage, progress }) {
  if (status === "completed") return 1;
  let before = 0;
  for (const [name, part] of STAGES[scene] ?? []) {
    if (name === stage) return (before + (part * (progress ?? 0)) / 100) / 100;
    before += part;
  }
  return 0;
}

/** What the task costs, in one phrase. */
export function moneyOf({ credits, confirmation, ended_at, status }) {
  const { estimated, held, charged, shortfall, settlement } = credits;
  const isOver = ended_at || ENDS.includes(status);
  if (!isOver && confirmation) return say("credits.confirm", { n: confirmation.estimated_cost });
  if (settlement === "unknown" || charged === null) return say("credits.unknown");
  if (isOver && shortfall) return say("credits.short", { n: charged, short: shortfall });
  if (charged) return say("credits.charged", { n: charged });
  if (isOver) return status === "completed" && held && settlement !== "settled" ? say("credits.held", { n: held }) : say("credits.nothing");
  if (held) return say("credits.held", { n: held });
  return estimated ? say("credits.about", { n: estimated }) : "";
}

/** A text that is as it was makes no work for the browser. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** One line about a failure: its code, the page's sentence, then what the platform said of it. */
function failed(code, sentence, rest = []) {
  const own = failure(code, sentence);
  const said = [element("code", { textContent: code }), `: ${own}`];
  if (sentence) said.push(own && " ", quoted(sentence));
  rest.forEach((part, n) => said.push(n ? ", " : " ", part));
  return element("span", { className: "line" }, ...said);
}

/** What is tried, since when, until when. */
function delayed({ code, sentence, call, tries, since: began, until, limit, next_try_at }) {
  const said = [];
  if (call) said.push(say("delay.failed", { call, n: tries }));
  if (began) said.push(say("delay.since", { time: clock(began) }));
  if (call && next_try_at) said.push(say("delay.next", { time: clock(next_try_at) }));
  if (until || limit) said.push(until ? say("delay.until", { time: clock(until) }) : quoted(limit));
  return failed(code, sentence, said);
}

/** The link to a task's run in the Temporal UI, or null. */
function temporalLink({ task_id, workflow_id }, { temporal_ui_url, namespace }) {
  const address = temporal_ui_url && webAddress(temporal_ui_url);
  if (!address) return null;
  const path = `/namespaces/${encodeURIComponent(namespace)}/workflows/${encodeURIComponent(workflow_id)}`;
  const link = element("a", { href: address.replace(/\/$/, "") + path, target: "_blank", rel: "noreferrer", textContent: say("action.temporal") });
  link.setAttribute("aria-label", say("action.temporal.task", { task: task_id }));
  return link;
}

export class Card {
  #actions;
  #links;
  #part = {};
  #log = { after: 0, lines: [] };
  #reached = 0;
  #isDoubted = false;
  #heading;

  /** `actions`: {cancel, confirm, again, use, trainingLog, large, may(operation)}; `links`: the Temporal UI; `heading`: of its title. */
  constructor(task, actions, links, heading = "h3") {
    this.#heading = heading;
    this.#actions = actions;
    this.#links = links;
    this.task = task;
    this.item = element("li");
    this.isAway = false;
    // Far off the screen the browser draws nothing of it: its times need no update there.
    this.item.addEventListener("contentvisibilityautostatechange", ({ skipped }) => {
      this.isAway = skipped;
      if (!skipped) this.showTime();
    });
    this.#build();
    this.show();
  }

  get isOver() {
    return Boolean(this.task.ended_at) || ENDS.includes(this.task.status);
  }

  get needsYou() {
    return Boolean(this.task.confirmation) && !this.isOver;
  }

  /** The stream was away: its store may have been restored and have fewer events. What is read next counts. */
  doubt() {
    this.#isDoubted = true;
  }

  /** Show the task as the gateway returned it; an answer that events have overtaken is left. */
  is(task) {
    if (task.last_seq < this.task.last_seq) {
      if (!this.#isDoubted) return;
      this.#reached = 0;
      this.#log = { after: 0, lines: [] };
    }
    this.#isDoubted = false;
    this.task = { ...task, input: task.input ?? this.task.input };
    this.show();
  }

  /** Apply an event. Returns whether the task is to be read again: not if it is older than what is shown. */
  apply(event) {
    if (event.seq <= this.task.last_seq) return this.#isDoubted;
    const status = ENDS_OF[event.event] ?? event.status; // an operator may have other words for ends
    const { seq, stage, progress, next_eta, queue_position, attempt, confirmation, error, result_urls, output } = event;
    Object.assign(this.task, { last_seq: seq, status, next_eta, queue_position, attempts: attempt });
    // The newer word: it is read with the task a moment later, with all else that events lack.
    if (next_eta && this.task.expected_end && new Date(next_eta) > new Date(this.task.expected_end)) this.task.expected_end = next_eta;
    if (stage) this.task.stage = stage;
    if (progress !== null) this.task.progress = progress;
    if (confirmation) this.task.confirmation = confirmation;
    if (error) this.task.error = error;
    if (result_urls) this.task.result_urls = result_urls;
    if (output) this.task.output = output;
    if (event.message) this.task.message = event.message;
    this.show();
    return true;
  }

  #build() {
    const { task_id, scene } = this.task;
    const part = this.#part;
    part.blank = element("p", { className: "blank" });
    part.results = element("ul", { className: "results", hidden: true });
    part.loss = element("figure", { className: "loss", hidden: true });
    part.title = element(this.#heading, { id: `task-${task_id}` });
    part.status = element("span", { className: "status" });
    part.facts = element("p", { className: "quiet" });
    part.fill = element("span", { className: "fill" });
    part.bar = element("div", { className: "progress", role: "progressbar" }, part.fill, ...this.#cuts(scene));
    part.bar.setAttribute("aria-label", say("progress", { task: task_id }));
    part.bar.setAttribute("aria-valuemin", 0);
    part.bar.setAttribute("aria-valuemax", 100);
    part.step = element("span");
    part.message = quoted("");
    part.now = element("p", { className: "now" }, part.step, part.message);
    part.money = element("span", { className: "money" });
    part.when = element("time", { dateTime: this.task.created_at, title: instant(this.task.created_at) });
    part.error = element("p", { className: "error", hidden: true });
    part.output = element("p", { className: "quiet output", hidden: true });
    part.confirm = element("div", { className: "confirm", hidden: true });
    part.article = element(
      "article", {},
      element("div", { className: "media" }, part.blank, part.results, part.loss),
      element("header", {}, part.title, part.status),
      part.facts, part.bar, part.now, part.confirm, part.error, part.output,
      element("p", { className: "foot" }, part.money, part.when),
      this.#footer(),
    );
    part.article.setAttribute("aria-label", task_id);
    this.item.append(part.article);
  }

  #cuts(scene) {
    let place = 0;
    return (STAGES[scene] ?? []).slice(0, -1).map(([, part]) => {
      const cut = element("span", { className: "cut" });
      cut.style.left = `${(place += part)}%`;
      return cut;
    });
  }

  #footer() {
    const { task_id } = this.task;
    const part = this.#part;
    const details = element("a", { href: `#task=${encodeURIComponent(task_id)}`, textContent: say("action.details") });
    details.setAttribute("aria-label", say("action.details.task", { task: task_id }));
    part.cancel = button(say("action.cancel"), say("action.cancel.task", { task: task_id }), () => this.#act(part.cancel, () => this.#actions.cancel(task_id)));
    part.runs = element("span", { className: "runs" });
    const temporal = temporalLink(this.task, this.#links);
    return element("p", { className: "actions" }, part.runs, part.cancel, details, ...(temporal ? [temporal] : []));
  }

  /** Copy prompt, run again, vary seed: as far as what was asked for is known and the token allows it. */
  runButtons(done = () => {}) {
    const { task_id: task, input, scene } = this.task;
    if (!input) return [];
    const made = [];
    if (input.prompt) {
      const copying = button(say("action.copy_prompt"), say("action.copy_prompt.task", { task }), () => copy(copying, input.prompt));
      made.push(copying);
    }
    const isImage = scene === "image.generate";
    // A long list of files was stored for that task alone.
    if (input.dataset?.files_sha256 || !this.#actions.may(isImage ? "start_image_task" : "start_training_task")) return made;
    const run = async (pressed, changes) => {
      const hasBegun = await this.#act(pressed, () => this.#actions.again(this.task, changes));
      done();
      return hasBegun;
    };
    const again = button(say("action.again"), say("action.again.task", { task }), () => run(again, {}));
    made.push(again);
    if (isImage) {
      // Pressed again where no answer came, it orders the same.
      let seed;
      const vary = button(say("action.vary"), say("action.vary.task", { task }), async () => {
        seed ??= crypto.getRandomValues(new Uint32Array(1))[0] % MAX_SEED;
        if (await run(vary, { extras: { ...input.extras, seed } })) seed = undefined;
      });
      made.push(vary);
    }
    return made;
  }

  /** Made when a price waits, and not before: the browser lays out each field of each card to see what it could fill in. */
  #confirmation() {
    const { task_id } = this.task;
    const { confirm: group } = this.#part;
    const field = element("input", { type: "number", min: 1, step: 1, required: true, name: "points" });
    const confirm = button(say("confirm"), say("confirm.task", { task: task_id }), () => {
      if (field.reportValidity()) this.#act(confirm, () => this.#actions.confirm(task_id, Number(field.value)));
    }, "");
    const text = element("p");
    group.append(text, element("label", {}, `${say("confirm.limit")} `, field), confirm);
    return ({ estimated_cost: n, current_balance: balance, confirm_by }) => {
      const price = balance === null ? "confirm.price" : "confirm.price.balance";
      text.textContent = confirm_by ? say(price, { n, balance, time: clock(confirm_by) }) : say("confirm.running", { n });
      if (!field.value || Number(field.value) < n) field.value = n;
    };
  }

  async #act(pressed, act) {
    pressed.disabled = true;
    try {
      return await act();
    } finally {
      pressed.disabled = false;
    }
  }

  show() {
    this.shownAt = Date.now();
    const { task } = this;
    const part = this.#part;
    part.article.dataset.status = task.status;
    part.article.dataset.scene = task.scene;
    const status = say(`status.${task.status}`);
    part.status.textContent = task.attempts > 1 ? say("status.attempt", { status, n: task.attempts }) : status;
    part.title.textContent = task.input?.prompt ?? task.input?.dataset?.dataset_id ?? task.task_id;
    this.#showFacts();
    this.#showProgress();
    this.showTime();
    part.money.textContent = moneyOf(task);
    part.confirm.hidden = !this.needsYou || !this.#actions.may("confirm_price");
    if (!part.confirm.hidden) (part.showConfirmation ??= this.#confirmation())(task.confirmation);
    part.cancel.hidden = this.isOver || !this.#actions.may("cancel_task");
    if (!part.runs.children.length) part.runs.replaceChildren(...this.runButtons());
    this.#showResults();
    this.#showErrors();
  }

  #showFacts() {
    const { scene, template_id, resolution, priority, input, ended_at, created_at } = this.task;
    const facts = [say(`scene.${scene}`), template_id, resolution];
    if (priority !== "standard") facts.push(say(`priority.${priority}`));
    if (input?.images > 1) facts.push(say("fact.images", { n: input.images }));
    if (input?.extras?.seed !== undefined) facts.push(say("fact.seed", { seed: String(input.extras.seed) }));
    for (const { model_id: id, model_url: url, strength = 1 } of input?.loras ?? [])
      facts.push(say("fact.lora", { model: id ?? fileOf(url), strength }));
    if (ended_at) facts.push(say("fact.took", { time: span((new Date(ended_at) - new Date(created_at)) / 1000) }));
    this.#part.facts.textContent = facts.filter(Boolean).join(" · ");
  }

  /** The bar of the whole task: it never goes back, also when another attempt begins. */
  #showProgress() {
    const { bar, fill } = this.#part;
    this.#reached = Math.max(this.#reached, wholeOf(this.task));
    bar.hidden = this.isOver && this.task.status !== "completed";
    fill.style.width = `${100 * this.#reached}%`;
    bar.setAttribute("aria-valuenow", Math.round(100 * this.#reached));
    bar.setAttribute("aria-valuetext", say("progress.text", { stage: this.#stage(), percent: percent(this.#reached) }));
  }

  #stage() {
    if (this.needsYou && this.task.confirmation.confirm_by) return say("stage.confirm");
    return say(this.task.stage ? `stage.${this.task.stage}` : "stage.none");
  }

  /** Called each second: updates the time that is left of the whole task, or of the stage where no more is known. */
  showTime() {
    const { expected_end, next_eta, queue_position, message, created_at } = this.task;
    const { now, when } = this.#part;
    setText(when, since(created_at));
    now.hidden = this.isOver;
    if (this.isOver) return;
    const said = [this.#stage()];
    const left = (at) => Math.round((new Date(at) - Date.now()) / 1000);
    if (expected_end) said.push(left(expected_end) > 0 ? say("eta.end", { time: span(left(expected_end)) }) : say("eta.moment"));
    else if (next_eta) said.push(left(next_eta) > 0 ? say("eta.in", { time: span(left(next_eta)) }) : say("eta.soon"));
    if (queue_position) said.push(say("eta.ahead", { n: queue_position }));
    setText(this.#part.step, said.join(" · "));
    setText(this.#part.message, message ?? "");
  }

  #showResults() {
    const { results, output, blank } = this.#part;
    const { task } = this;
    const addresses = (task.result_urls ?? []).map(webAddress).filter(Boolean);
    drawResults(results, addresses, task.task_id, (n) => this.#actions.large(this, addresses, n));
    results.hidden = !addresses.length;
    blank.hidden = Boolean(addresses.length) || task.scene === "model.train";
    const ends = { failed: "result.none", cancelled: "result.cancelled", completed: "result.none" };
    blank.textContent = this.isOver ? say(ends[task.status] ?? "result.none") : percent(this.#reached);
    const model = task.output?.model_path;
    output.hidden = !model;
    const isUsable = task.status === "completed" && this.#actions.may("start_image_task");
    if (model && output.dataset.known !== `${isUsable} ${model}`) {
      output.dataset.known = `${isUsable} ${model}`;
      const copying = button(say("action.copy_address"), null, () => copy(copying, model));
      const using = button(say("action.use"), say("action.use.task", { task: task.task_id }), () => this.#act(using, () => this.#actions.use(task)));
      const buttons = element("span", { className: "actions" }, copying, ...(isUsable ? [using] : []));
      output.replaceChildren(element("span", {}, `${say("model")} `, element("code", { textContent: model, title: model })), " ", buttons);
    }
  }

  #showErrors() {
    const { error, exceptions, delays, message, status } = this.task;
    const lines = (exceptions ?? []).map((exception) => failed(exception.code, exception.message));
    if (!this.isOver) lines.push(...(delays ?? []).map(delayed));
    if (error && !lines.length) lines.push(failed(error.code, status === "failed" && message ? message : error.message));
    this.#part.error.replaceChildren(...lines);
    this.#part.error.hidden = !lines.length;
  }

  /** Read new lines of the training log and redraw the curve. */
  async drawLoss() {
    if (this.task.scene !== "model.train") return;
    const { lines, after } = await this.#actions.trainingLog(this.task.task_id, this.#log.after);
    this.#log = { after, lines: [...this.#log.lines, ...lossesOf(lines)].slice(-1000) };
    drawLosses(this.#part.loss, this.#log.lines);
    this.#showResults();
  }
}
