// What a training is trained on: one of the tenant's datasets, or one that is named by its id and its address.

import { option } from "./fields.js";
import { say } from "./words.js";

const OTHER = "";

/** `{name}, 12 files`; without the number where it is not known. */
function textOf({ name, file_count, is_whole }) {
  if (file_count === null) return name;
  return say(is_whole ? "start.dataset.files" : "start.dataset.too_many", { name, n: file_count });
}

export class DatasetChoice {
  #form;
  #known = document.getElementById("datasets");
  #listed = new Map();

  constructor(form) {
    this.#form = form;
    form.elements.dataset.onchange = () => this.#show();
    this.#show();
  }

  /** The tenant's datasets; none where they are not listed. What is chosen stays. */
  offer(datasets) {
    const { dataset, source_uri } = this.#form.elements;
    const before = this.#listed.size ? dataset.value : null;
    this.#listed = new Map(datasets.map((one) => [one.source_uri, one]));
    const options = datasets.map((one) => Object.assign(option(one.source_uri, textOf(one)), { disabled: one.file_count === 0 || !one.is_whole }));
    dataset.replaceChildren(...options, option(OTHER, say("start.dataset.other")));
    const kept = options.find(({ value }) => value === before);
    const first = options.find(({ disabled }) => !disabled);
    const isTyped = before === OTHER || (before === null && source_uri.value);
    dataset.value = isTyped ? OTHER : ((kept ?? first)?.value ?? OTHER);
    this.#show();
  }

  /** Datasets of these trainings, for who types one. Of two addresses of one dataset the newest task's counts. */
  suggest(tasks) {
    const given = tasks.filter(({ input }) => input?.dataset).sort((one, other) => (one.created_at < other.created_at ? -1 : 1));
    const sources = new Map(given.map(({ input }) => [input.dataset.dataset_id, input.dataset.source_uri]));
    this.#known.replaceChildren(...[...sources.keys()].map((id) => option(id, "")));
    const { dataset_id, source_uri } = this.#form.elements;
    dataset_id.onchange = () => sources.has(dataset_id.value) && (source_uri.value = sources.get(dataset_id.value));
  }

  /** As an order names it. */
  given() {
    const { dataset, dataset_id, source_uri } = this.#form.elements;
    const chosen = this.#listed.get(dataset.value);
    return chosen ? { dataset_id: chosen.dataset_id, source_uri: chosen.source_uri } : { dataset_id: dataset_id.value, source_uri: source_uri.value };
  }

  #show() {
    const { dataset, dataset_id, source_uri } = this.#form.elements;
    dataset.closest("label").hidden = !this.#listed.size;
    for (const typed of [dataset_id, source_uri]) typed.closest("label").hidden = typed.disabled = this.#listed.has(dataset.value);
  }
}
