// The form that starts a task: the templates that ComfyUI lists, what each takes, and the price before it is paid.
// Where ComfyUI lists none, a template's id is typed in, and the price is what the same cost the last time.

import { DatasetChoice } from "./datasets.js";
import { labelled, option, priced } from "./fields.js";
import { integer } from "./json.js";
import { LoraRows } from "./loras.js";
import { element } from "./results.js";
import { say } from "./words.js";

const SCENES = { images: "image.generate", trainings: "model.train" };
const FIRST = { images: "text-to-image", trainings: "lora-train" };
const RESOLUTIONS = ["sd", "hd", "4k"];
const FREE = ["seed", "negative_prompt"];
const MOST_IMAGES = 16;
const EXTRA = "extras.";
const MOST_LORAS = 8; // what the platform takes, where ComfyUI does not say what a template takes
const FILES = { image: "image", mask: "image", video: "video", audio: "audio" }; // of an extra: what a browser calls it

/** Whether a template takes trained models. A price that is not known means that it would refuse them. */
const takesLoras = ({ scene, loras }) => scene === SCENES.images && Boolean(loras?.most) && loras.points !== null;

const rangeOf = (minimum, maximum) => (Number.isFinite(minimum) && Number.isFinite(maximum) ? `${minimum}–${maximum}` : "");

function fieldOf(name, { type, minimum, maximum, choices, max_length }) {
  if (type === "boolean") return element("input", { name, type: "checkbox" });
  if (type === "choice") return element("select", { name }, option("", say("start.extra.none")), ...(choices ?? []).map((choice) => option(choice)));
  if (type === "text") return element("input", { name, maxLength: max_length ?? 4096 });
  if (type in FILES) return element("input", { name, type: "url", maxLength: 2048, placeholder: "https://" });
  return element("input", { name, type: "number", min: minimum ?? "", max: maximum ?? "", placeholder: rangeOf(minimum, maximum), step: type === "integer" ? 1 : "any" });
}

function valueOf(field, type) {
  if (type === "boolean") return field.checked || undefined;
  if (field.value === "") return undefined;
  return type === "integer" ? integer(field.value) : type === "number" ? Number(field.value) : field.value;
}

export class StartForm {
  #form = document.getElementById("start-form");
  #typed = this.#form.elements.template_id;
  #chosen = element("select", { name: "template_id" });
  #part = Object.fromEntries(["templates", "template-summary", "extras", "controls", "price"].map((id) => [id, document.getElementById(id)]));
  #loras = new LoraRows();
  #datasets = new DatasetChoice(this.#form);
  #offered = null;
  #opening = null;
  #page;

  /** `page`: {tasks(), templates(), models(), datasets(), upload(file, kind), start(kind, order)} */
  constructor(page) {
    this.#page = page;
    const form = this.#form;
    form.elements.prompt.value = say("start.prompt.example");
    form.elements.kind.onchange = () => this.#kindChanged();
    this.#chosen.onchange = () => this.#templateChanged();
    form.oninput = () => this.#changed();
    form.onsubmit = async (submitted) => {
      submitted.preventDefault();
      const pressed = form.querySelector("button");
      pressed.disabled = true;
      try {
        await page.start(...this.order());
      } finally {
        pressed.disabled = false;
      }
    };
  }

  get #kind() {
    return this.#form.elements.kind.value;
  }

  /** The chosen template as ComfyUI lists it; null where it lists none. */
  get #template() {
    const id = this.#form.elements.template_id.value;
    return this.#offered?.find(({ template_id, scene }) => template_id === id && scene === SCENES[this.#kind]) ?? null;
  }

  /** What is known of templates, trained models and datasets, read each time the form is opened. */
  opened() {
    this.#opening ??= this.#open().finally(() => (this.#opening = null));
    return this.#opening;
  }

  /** Fill in that an image uses this training's model. Returns false if no template takes one. */
  async use(training) {
    await this.opened();
    const { elements } = this.#form;
    const fitting = (this.#offered ?? []).find(takesLoras);
    if (this.#offered && !fitting) return false;
    if (this.#kind !== "images") {
      elements.kind.value = "images";
      this.#kindChanged();
    }
    if (fitting && !takesLoras(this.#template)) {
      this.#chosen.value = fitting.template_id;
      this.#templateChanged();
    }
    this.#loras.choose(training);
    this.#changed();
    elements.prompt.focus();
    return true;
  }

  async #open() {
    this.#suggest();
    this.#changed();
    const [listed, models, datasets] = await Promise.all([this.#page.templates(), this.#page.models(), this.#page.datasets()]);
    this.#loras.offer(models);
    this.#datasets.offer(datasets);
    this.#suggest(models);
    const offered = listed?.length ? listed : null;
    // What is filled in stays, unless the templates are others.
    if (JSON.stringify(offered) === JSON.stringify(this.#offered)) return this.#allowLoras();
    this.#offered = offered;
    this.#showTemplates();
  }

  #kindChanged() {
    for (const fields of this.#form.querySelectorAll("fieldset")) {
      fields.hidden = fields.disabled = fields.dataset.kind !== this.#kind;
    }
    this.#typed.value = FIRST[this.#kind];
    this.#showTemplates();
  }

  /** A list to choose from where ComfyUI offers one, else a field. */
  #showTemplates() {
    const { elements } = this.#form;
    const before = elements.template_id.value;
    const ids = (this.#offered ?? []).filter(({ scene }) => scene === SCENES[this.#kind]).map(({ template_id }) => template_id);
    const wanted = ids.length ? this.#chosen : this.#typed;
    if (ids.length) this.#chosen.replaceChildren(...ids.map((id) => option(id)));
    if (elements.template_id !== wanted) elements.template_id.replaceWith(wanted);
    if (ids.length) this.#chosen.value = ids.includes(before) ? before : ids.includes(FIRST[this.#kind]) ? FIRST[this.#kind] : ids[0];
    this.#templateChanged();
  }

  #templateChanged() {
    const template = this.#template;
    const { elements } = this.#form;
    const summary = this.#part["template-summary"];
    const said = template ? [template.summary, template.is_available ? "" : say("start.template.away")].filter(Boolean) : [];
    summary.textContent = said.join(" ");
    summary.hidden = !said.length;
    this.#choices(elements.resolution, template?.resolutions, RESOLUTIONS, "hd");
    this.#baseModels(template);
    this.#drawExtras(template);
    this.#drawControls(template);
    this.#allowLoras();
    elements.negative_prompt.closest("label").hidden = elements.negative_prompt.disabled = !template?.inputs.negative_prompt;
    // Where no template is listed it may take several.
    const most = template ? (template.images?.most ?? 1) : MOST_IMAGES;
    elements.images.max = most;
    if (Number(elements.images.value) > most) elements.images.value = most;
    elements.images.closest("label").hidden = elements.images.disabled = most < 2;
    elements.seed.closest("label").hidden = elements.seed.disabled = Boolean(template) && !template.inputs.seed;
    this.#changed();
  }

  /** Options of a list with the price of each; `plain` where none is known. */
  #choices(select, offered, plain, first) {
    const before = select.value;
    const prices = Object.entries(offered ?? {}).filter(([, { points }]) => points !== null);
    const order = ([one], [other]) => plain.indexOf(one) - plain.indexOf(other);
    const options = prices.length ? prices.sort(order).map(([name, { points }]) => option(name, priced("start.option", name, points))) : plain.map((name) => option(name));
    select.replaceChildren(...options);
    select.value = before || first;
    if (!select.value) select.selectedIndex = 0;
  }

  #baseModels(template) {
    const { base_model: field } = this.#form.elements;
    const offered = Object.keys(template?.base_models ?? {});
    if (!offered.length) {
      if (field.localName !== "input") field.replaceWith(element("input", { name: "base_model", value: "base", required: true, pattern: "[A-Za-z0-9_\\-]{1,64}" }));
      return;
    }
    const select = element("select", { name: "base_model" });
    const before = field.value;
    field.replaceWith(select);
    this.#choices(select, template.base_models, offered, before);
  }

  /** Extras without a price are left out: a request with one is refused. */
  #drawExtras(template) {
    const extras = Object.entries(template?.extras ?? {}).filter(([, { points }]) => points !== null);
    const { extras: box } = this.#part;
    box.hidden = !extras.length;
    box.replaceChildren(...extras.flatMap(([name, extra]) => {
      const field = fieldOf(EXTRA + name, extra);
      const text = priced("start.extra", name, extra.points);
      if (!(extra.type in FILES)) return [labelled(text, field, extra.type === "boolean" ? "check" : "")];
      field.required = Boolean(extra.required);
      return this.#fileFields(extra.required ? text : say("start.optional", { name: text }), field, extra.type);
    }));
  }

  /** An address, and a file to choose or to drop on it instead: it is uploaded, and the address becomes the upload's. */
  #fileFields(text, address, kind) {
    const file = element("input", { type: "file", accept: `${FILES[kind]}/*` });
    const label = labelled(text, address, "wide");
    const send = async (chosen) => {
      if (!chosen || file.disabled) return;
      file.disabled = true;
      const upload = await this.#page.upload(chosen, kind);
      file.disabled = false;
      if (!upload) return;
      address.value = upload.address;
      this.#changed();
    };
    file.onchange = () => send(file.files[0]);
    label.ondragover = (dragged) => dragged.preventDefault();
    label.ondrop = (dropped) => {
      dropped.preventDefault();
      if (!address.disabled) send(dropped.dataTransfer.files[0]);
    };
    return [label, labelled(say("start.file"), file, "wide")];
  }

  #drawControls(template) {
    const slots = template?.controls ?? [];
    const { controls: box } = this.#part;
    box.hidden = !slots.length;
    box.replaceChildren(...slots.flatMap(({ kind, strength }, n) => {
      const required = slots.slice(n).some((later) => later.required);
      const text = say(kind ? "start.control.kind" : "start.control", { kind });
      const address = element("input", { name: `control.${n}`, type: "url", maxLength: 2048, required, placeholder: "https://" });
      const made = this.#fileFields(required ? text : say("start.optional", { name: text }), address, "image");
      if (strength) made.push(labelled(say("start.control.strength"), element("input", { name: `strength.${n}`, type: "number", min: 0, max: 1, step: 0.05, value: 1 })));
      return made;
    }));
  }

  #allowLoras() {
    const template = this.#template;
    if (!template) return this.#loras.allow(MOST_LORAS, 0);
    return takesLoras(template) ? this.#loras.allow(template.loras.most, template.loras.points) : this.#loras.allow(0, 0);
  }

  #changed() {
    // Images count by their place: none may be left out before another.
    const addresses = [...this.#part.controls.querySelectorAll("input[type=url]")];
    addresses.forEach((field, n) => (field.disabled = n > 0 && !addresses[n - 1].value));
    this.#part.price.textContent = this.#price();
  }

  #extrasGiven() {
    const { elements } = this.#form;
    const given = {};
    for (const [name, { type }] of Object.entries(this.#template?.extras ?? {})) {
      const field = elements[EXTRA + name];
      const value = field && valueOf(field, type);
      if (value !== undefined) given[name] = value;
    }
    if (elements.seed.value && !elements.seed.disabled) given.seed = integer(elements.seed.value);
    if (elements.negative_prompt.value && !elements.negative_prompt.disabled) given.negative_prompt = elements.negative_prompt.value;
    return given;
  }

  #controlsGiven(given) {
    return (this.#template?.controls ?? []).flatMap(({ kind }, n) => {
      const image_url = given[`control.${n}`];
      if (!image_url) return [];
      const strength = given[`strength.${n}`];
      return [{ image_url, ...(kind ? { kind } : {}), ...(strength ? { strength: Number(strength) } : {}) }];
    });
  }

  /** [kind, body] as the gateway takes it. */
  order() {
    const given = Object.fromEntries([...new FormData(this.#form)].filter(([, value]) => value !== ""));
    const { kind, template_id, priority } = given;
    const order = { template_id, priority };
    if (given.max_credits) order.max_credits = Number(given.max_credits);
    if (kind === "images") {
      const [extras, controls, loras] = [this.#extrasGiven(), this.#controlsGiven(given), this.#loras.given()];
      Object.assign(order, { prompt: given.prompt, resolution: given.resolution });
      if (Object.keys(extras).length) order.extras = extras;
      if (controls.length) order.controls = controls;
      if (loras.length) order.loras = loras;
      if (Number(given.images) > 1) order.images = Number(given.images);
    } else {
      const { base_model, epochs, batch_size, learning_rate } = given;
      const hyperparameters = { epochs: Number(epochs), batch_size: Number(batch_size), learning_rate: Number(learning_rate) };
      Object.assign(order, { base_model, dataset: this.#datasets.given(), hyperparameters });
    }
    return [kind, order];
  }

  #price() {
    const template = this.#template;
    if (!template) return this.#lastPrice();
    const [kind, { priority, resolution, base_model, extras, loras = [], images = 1 }] = this.order();
    const base = kind === "images" ? template.resolutions[resolution]?.points : template.points;
    const model = kind === "images" ? 0 : template.base_models[base_model]?.points;
    const paid = Object.keys(extras ?? {}).filter((name) => !FREE.includes(name)).map((name) => template.extras[name].points);
    const parts = [base, model, priority === "accelerated" ? template.accelerated_points : 0, ...paid, ...loras.map(() => template.loras.points)];
    if (parts.some((points) => points === null || points === undefined)) return say("start.price.none");
    const n = images * parts.reduce((one, other) => one + other, 0);
    if (kind === "images" || !template.points_per_gpu_hour) return say("start.price.now", { n });
    return say("start.price.training", { n, hours: template.included_gpu_hours ?? 0, per: template.points_per_gpu_hour });
  }

  /** What a task that was ordered alike cost, or would have cost. */
  #lastPrice() {
    const [kind, { template_id, priority, resolution, base_model, loras, images }] = this.order();
    if (loras || images) return say("start.price.unknown");
    const alike = this.#page.tasks().filter((task) =>
      task.scene === SCENES[kind] && task.template_id === template_id && task.priority === priority &&
      task.resolution === (resolution ?? base_model) && task.input && !task.input.loras?.length && !task.input.images && Object.keys(task.input.extras ?? {}).every((name) => FREE.includes(name)));
    const known = alike.map(({ created_at, credits, confirmation }) => ({ created_at, n: credits.charged || credits.estimated || confirmation?.estimated_cost || 0 })).filter(({ n }) => n);
    const newest = known.sort((one, other) => (one.created_at < other.created_at ? 1 : -1))[0];
    return newest ? say("start.price", { n: newest.n }) : say("start.price.unknown");
  }

  /** Templates and datasets of the tasks that are shown, and of `trainings`. */
  #suggest(trainings = []) {
    const { templates } = this.#part;
    const tasks = [...trainings, ...this.#page.tasks()];
    const known = new Set([...templates.children].map(({ value }) => value));
    templates.append(...[...new Set(tasks.map(({ template_id }) => template_id))].filter((id) => !known.has(id)).map((id) => option(id, "")));
    this.#datasets.suggest(tasks);
  }
}
