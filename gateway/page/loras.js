// The trained models that an image uses: a row for each, with its strength, and an empty one as long as one may be added.

import { labelled, option, priced } from "./fields.js";
import { element } from "./results.js";
import { say } from "./words.js";

const STRENGTH = { type: "number", min: 0, max: 2, step: 0.05, value: 1, required: true };

/** Dataset, base model and id: what tells trained models apart. */
const nameOf = ({ task_id, resolution, input }) => [input?.dataset?.dataset_id, resolution, task_id].filter(Boolean).join(" · ");

export class LoraRows {
  #box = document.getElementById("loras");
  #models = [];
  #most = 0;
  #points = 0;
  #rows = [];

  /** What may be chosen: completed trainings. What is chosen stays, whatever of it is offered. */
  offer(trainings) {
    const chosen = new Set(this.given().map(({ model_id }) => model_id));
    const kept = this.#models.filter(({ task_id }) => chosen.has(task_id) && !trainings.some((one) => one.task_id === task_id));
    this.#models = [...kept, ...trainings];
    for (const row of this.#rows) this.#fill(row);
    this.#arrange();
  }

  /** The template takes so many, for so many points each. */
  allow(most, points) {
    this.#most = most;
    this.#points = points;
    this.#arrange();
  }

  /** Have this model among the chosen ones, in the place of the last one where no other may be added. */
  choose(training) {
    if (!this.#models.some(({ task_id }) => task_id === training.task_id)) this.offer([training, ...this.#models]);
    if (this.#rows.some(({ model }) => model.value === training.task_id)) return;
    const row = this.#rows.find(({ model }) => !model.value) ?? this.#rows.at(-1);
    row.model.value = training.task_id;
    row.strength.value = STRENGTH.value;
    this.#arrange();
  }

  /** As an order names them. */
  given() {
    return this.#rows.filter(({ model }) => model.value).slice(0, this.#most).map(({ model, strength }) => ({ model_id: model.value, strength: Number(strength.value) }));
  }

  #row() {
    const row = { model: element("select"), strength: element("input", STRENGTH), title: element("span") };
    row.labels = [element("label", {}, row.title, row.model), labelled(say("start.lora.strength"), row.strength)];
    row.model.oninput = () => this.#arrange(row);
    this.#fill(row);
    return row;
  }

  #fill({ model }) {
    const before = model.value;
    model.replaceChildren(option("", say("start.extra.none")), ...this.#models.map((training) => option(training.task_id, nameOf(training))));
    model.value = before;
  }

  /** One empty row at most, and no row moves that somebody is at: `touched`. */
  #arrange(touched) {
    const most = Math.min(this.#most, this.#models.length);
    const chosen = this.#rows.filter(({ model }) => model.value);
    const empty = this.#rows.find((row) => row === touched && !row.model.value) ?? this.#rows.find(({ model }) => !model.value);
    const isFull = chosen.length >= most;
    const rows = this.#rows.filter((row) => row.model.value || row === empty).slice(0, most);
    if (!isFull && !empty) rows.push(this.#row());
    for (const row of this.#rows) if (!rows.includes(row)) row.labels.forEach((label) => label.remove());
    this.#rows = rows;
    rows.forEach((row, n) => {
      if (!row.labels[0].isConnected) this.#box.append(...row.labels);
      row.title.textContent = priced("start.extra", say("start.lora", { place: n + 1 }), this.#points);
      row.labels[1].hidden = row.strength.disabled = !row.model.value;
      for (const one of row.model.options) one.disabled = Boolean(one.value) && rows.some((other) => other !== row && other.model.value === one.value);
    });
    this.#box.hidden = !rows.length;
  }
}
