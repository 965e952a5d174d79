// Requests and the stream, as any client of the gateway would make them.

const TASKS = "/api/v1/tasks";
const SILENCE_SECONDS = 40; // heartbeats come every 15 s
const EVENTS = ["task.accepted", "task.running", "task.checkpoint", "task.completed", "task.failed", "task.cancelled", "credits.updated"];

/** A refused request. The message is the problem document's, to be displayed. */
export class Refused extends Error {
  constructor(status, problem) {
    const fields = (problem.fields ?? []).map(({ field, message }) => `${field}: ${message}`);
    super([problem.detail ?? `The gateway answered ${status}.`, ...fields].join("\n"));
    this.status = status;
  }
}

export class Api {
  #token;

  constructor(token) {
    this.#token = token;
  }

  async #request(path, options = {}) {
    const headers = { authorization: `Bearer ${this.#token}` };
    if (options.body) headers["content-type"] = "application/json";
    const answer = await fetch(TASKS + path, { ...options, headers, cache: "no-store" });
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Refused(answer.status, body);
    return body;
  }

  #post(path, body) {
    return this.#request(path, { method: "POST", body: JSON.stringify(body) });
  }

  #of(taskId, what) {
    return `/${encodeURIComponent(taskId)}${what}`;
  }

  list(status, cursor) {
    const query = new URLSearchParams({ limit: "30" });
    if (status) query.set("status", status);
    if (cursor) query.set("cursor", cursor);
    return this.#request(`?${query}`);
  }

  task(taskId) {
    return this.#request(this.#of(taskId, ""));
  }

  async trainingLog(taskId, after) {
    return this.#request(this.#of(taskId, `/training-log?after=${after}`));
  }

  start(kind, order) {
    return this.#post(`/${kind}`, order);
  }

  cancel(taskId) {
    return this.#post(this.#of(taskId, "/cancel"), { reason: "cancelled on the live page" });
  }

  confirm(taskId, maxCredits) {
    return this.#post(this.#of(taskId, "/confirm-price"), { max_credits: maxCredits });
  }

  streamConfig() {
    return this.#request("/stream/config");
  }
}

/** All tasks' events while the page is open. After an interruption the list is read again. */
export class Live {
  #api;
  #listener;
  #source = null;
  #tries = 0;
  #heardAt = 0;
  #timer = null;

  /** `listener`: {event(event), live(), waiting(seconds), refused(error)} */
  constructor(api, listener) {
    this.#api = api;
    this.#listener = listener;
    setInterval(() => this.#listenForSilence(), 1000);
    addEventListener("online", () => this.#again(0));
  }

  async open() {
    this.#close();
    let config;
    try {
      config = await this.#api.streamConfig();
    } catch (error) {
      if (error instanceof Refused && [401, 403].includes(error.status)) this.#listener.refused(error);
      else this.#again();
      return;
    }
    this.backoff = config.retry_backoff_seconds;
    // Only its path: the stream has the same origin as the page, even if the gateway has another public name.
    const address = new URL(new URL(config.sse_url).pathname, location.origin);
    address.search = new URLSearchParams({ subscribe: "*", token: config.token });
    const source = (this.#source = new EventSource(address));
    this.#heardAt = Date.now();
    source.onopen = () => {
      this.#tries = 0;
      this.#listener.live();
    };
    source.onerror = () => source === this.#source && this.#again();
    source.addEventListener("system.heartbeat", () => (this.#heardAt = Date.now()));
    for (const type of EVENTS) {
      source.addEventListener(type, ({ data }) => {
        this.#heardAt = Date.now();
        this.#listener.event(JSON.parse(data));
      });
    }
  }

  #again(seconds) {
    this.#close();
    const backoff = this.backoff ?? [1, 2, 5];
    const wait = seconds ?? backoff[Math.min(this.#tries++, backoff.length - 1)];
    this.#listener.waiting(wait);
    this.#timer = setTimeout(() => this.open(), wait * 1000);
  }

  #close() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  #listenForSilence() {
    if (this.#source && Date.now() - this.#heardAt > SILENCE_SECONDS * 1000) this.#again(0);
  }
}
