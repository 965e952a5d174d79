// One task on the page. Foreign text is inserted as text only; an address becomes a link only with http or https.

import { drawLosses, lossesOf } from "./loss.js";

const STAGES = {
  "image.generate": ["queued", "processing", "delivery"],
  "model.train": ["data_ingest", "training", "evaluating", "publishing"],
};
const ENDS = ["completed", "failed", "cancelled"];
const ENDS_OF = { "task.completed": "completed", "task.failed": "failed", "task.cancelled": "cancelled" };
const KINDS = { "image.generate": "image", "model.train": "training" };

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
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

/** What is tried, since when, until when. */
function delayed({ code, sentence, call, tries, since, until, limit, next_try_at }) {
  const time = (at) => new Date(at).toLocaleTimeString();
  const said = [];
  if (call) said.push(`${call} failed ${tries} times`);
  if (since) said.push(`since ${time(since)}`);
  if (call && next_try_at) said.push(`next try ${time(next_try_at)}`);
  if (until || limit) said.push(until ? `until ${time(until)}` : limit);
  return `${code}: ${sentence} ${said.join(", ")}`.trim();
}

export class Card {
  #actions;
  #links;
  #parts = {};
  #log = { after: 0, lines: [] };

  /** `actions`: {cancel(taskId), confirm(taskId, points), trainingLog(taskId, after)}; `links`: the Temporal UI. */
  constructor(task, actions, links) {
    this.#actions = actions;
    this.#links = links;
    this.task = task;
    this.item = element("li");
    this.#build();
    this.show();
  }

  get isOver() {
    return ENDS.includes(this.task.status);
  }

  /** Show the task as the gateway returned it. */
  is(task) {
    if (task.last_seq < this.task.last_seq) return;
    this.task = task;
    this.show();
  }

  /** Apply an event. Returns false if it is older than what is shown. */
  apply(event) {
    if (event.seq <= this.task.last_seq) return false;
    const status = ENDS_OF[event.event] ?? event.status; // an operator may have other words for ends
    const { seq, stage, progress, next_eta, queue_position, attempt, confirmation, error, result_urls, output } = event;
    Object.assign(this.task, { last_seq: seq, status, next_eta, queue_position, attempts: attempt });
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
    const { task_id, scene, template_id, resolution, priority, workflow_id } = this.task;
    const part = this.#parts;
    const title = element("h3", { id: `task-${task_id}`, textContent: task_id });
    part.status = element("span", { className: "status" });
    part.stages = element("ol", { className: "stages" }, ...(STAGES[scene] ?? []).map((stage) => element("li", { textContent: stage })));
    part.stages.setAttribute("aria-label", "stages");
    part.progress = element("progress", { max: 100 });
    part.progress.setAttribute("aria-label", `progress of ${task_id}`);
    part.eta = element("p", { className: "quiet eta" });
    part.credits = element("dl", { className: "credits" });
    part.pictures = element("ul", { className: "pictures", hidden: true });
    part.loss = element("figure", { className: "loss", hidden: true });
    part.output = element("p", { className: "quiet", hidden: true });
    part.error = element("p", { className: "error", hidden: true });
    part.confirm = this.#confirmation();
    part.cancel = element("button", { className: "plain", type: "button", textContent: "Cancel" });
    part.cancel.setAttribute("aria-label", `Cancel ${task_id}`);
    part.cancel.onclick = () => this.#act(part.cancel, () => this.#actions.cancel(task_id));
    const footer = element("p", { className: "actions" }, part.cancel);
    const address = this.#links.temporal_ui_url && webAddress(this.#links.temporal_ui_url);
    if (address) {
      const path = `/namespaces/${encodeURIComponent(this.#links.namespace)}/workflows/${encodeURIComponent(workflow_id)}`;
      const link = element("a", { href: address.replace(/\/$/, "") + path, target: "_blank", rel: "noreferrer", textContent: "in the Temporal UI" });
      link.setAttribute("aria-label", `${task_id} in the Temporal UI`);
      footer.append(link);
    }
    part.article = element(
      "article", {},
      element("header", {}, title, part.status),
      element("p", { className: "quiet", textContent: [KINDS[scene] ?? scene, template_id, resolution, priority].join(" · ") }),
      part.stages, part.progress, part.eta, part.credits, part.confirm, part.error, part.pictures, part.loss, part.output, footer,
    );
    part.article.setAttribute("aria-labelledby", title.id);
    this.item.append(part.article);
  }

  #confirmation() {
    const { task_id } = this.task;
    const field = element("input", { type: "number", min: 1, step: 1, required: true, name: "points" });
    const button = element("button", { type: "button", textContent: "Confirm" });
    button.setAttribute("aria-label", `Confirm the price of ${task_id}`);
    button.onclick = () => field.reportValidity() && this.#act(button, () => this.#actions.confirm(task_id, Number(field.value)));
    const text = element("p");
    const group = element("div", { className: "confirm", hidden: true }, text, element("label", {}, "Limit in points ", field), button);
    group.show = ({ estimated_cost, current_balance, confirm_by }) => {
      const balance = current_balance === null ? "" : `, the balance is ${current_balance}`;
      text.textContent = `The price is ${estimated_cost} points${balance}. Confirm it by ${new Date(confirm_by).toLocaleTimeString()}.`;
      if (!field.value || Number(field.value) < estimated_cost) field.value = estimated_cost;
    };
    return group;
  }

  async #act(button, act) {
    button.disabled = true;
    try {
      await act();
    } finally {
      button.disabled = false;
    }
  }

  show() {
    this.shownAt = Date.now();
    const { task } = this;
    const part = this.#parts;
    part.article.dataset.status = task.status;
    part.status.textContent = task.attempts > 1 ? `${task.status}, attempt ${task.attempts}` : task.status;
    const stages = STAGES[task.scene] ?? [];
    const at = task.status === "completed" ? stages.length : stages.indexOf(task.stage);
    [...part.stages.children].forEach((item, n) => {
      item.toggleAttribute("data-done", n < at);
      if (n === at && !this.isOver) item.setAttribute("aria-current", "step");
      else item.removeAttribute("aria-current");
    });
    part.progress.value = task.status === "completed" ? 100 : (task.progress ?? 0);
    this.showTime();
    this.#showCredits();
    part.confirm.hidden = !task.confirmation || this.isOver;
    if (!part.confirm.hidden) part.confirm.show(task.confirmation);
    part.cancel.hidden = this.isOver;
    this.#showResults();
    this.#showErrors();
  }

  /** Called each second: updates remaining times. */
  showTime() {
    const { next_eta, queue_position, message } = this.task;
    const said = [];
    if (!this.isOver && next_eta) {
      const seconds = Math.round((new Date(next_eta) - Date.now()) / 1000);
      said.push(seconds > 0 ? `next stage in ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}` : "next stage any moment");
    }
    if (!this.isOver && queue_position) said.push(`${queue_position} ahead in the queue`);
    if (message && this.task.status !== "failed") said.push(message);
    this.#parts.eta.textContent = said.join(" · ");
    this.#parts.eta.hidden = !said.length;
  }

  #showCredits() {
    const { held, shortfall } = this.task.credits;
    // Unknown amounts are null and shown as unknown.
    const charged = this.task.credits.charged ?? "unknown";
    const returned = this.task.credits.returned ?? "unknown";
    // Until a price is confirmed, only the confirmation holds the estimate.
    const estimated = this.task.credits.estimated || (this.task.confirmation?.estimated_cost ?? 0);
    const amounts = { estimated, held, charged, returned };
    if (shortfall) amounts.shortfall = shortfall;
    this.#parts.credits.replaceChildren(
      ...Object.entries(amounts).map(([name, points]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: points }))),
    );
  }

  #showResults() {
    const { pictures, output } = this.#parts;
    const addresses = (this.task.result_urls ?? []).map(webAddress).filter(Boolean);
    if (addresses.length !== pictures.children.length) {
      pictures.replaceChildren(
        ...addresses.map((address, n) => {
          const alt = `result ${n + 1} of ${this.task.task_id}`;
          const picture = element("img", { src: address, alt, loading: "lazy", referrerPolicy: "no-referrer" });
          return element("li", {}, element("a", { href: address, target: "_blank", rel: "noreferrer" }, picture));
        }),
      );
    }
    pictures.hidden = !addresses.length;
    output.hidden = !this.task.output;
    if (this.task.output) output.textContent = `model ${this.task.output.model_path}`;
  }

  #showErrors() {
    const { error, exceptions, delays, message, status } = this.task;
    const lines = (exceptions ?? []).map((exception) => `${exception.code}: ${exception.message}`);
    if (!this.isOver) lines.push(...(delays ?? []).map(delayed));
    if (error && !lines.length) lines.push(`${error.code}: ${status === "failed" && message ? message : error.message}`);
    this.#parts.error.textContent = lines.join("\n");
    this.#parts.error.hidden = !lines.length;
  }

  /** Read new lines of the training log and redraw the curve. */
  async drawLoss() {
    if (this.task.scene !== "model.train") return;
    const { lines, after } = await this.#actions.trainingLog(this.task.task_id, this.#log.after);
    this.#log = { after, lines: [...this.#log.lines, ...lossesOf(lines)].slice(-1000) };
    drawLosses(this.#parts.loss, this.#log.lines);
  }
}
