// Requests and the stream, as any client of the gateway would make them.

import { parse, stringify } from "./json.js";
import { say } from "./words.js";

const TASKS = "/api/v1/tasks";
const UPLOADS = "/api/v1/uploads";
const ANSWER_SECONDS = 20;
const UPLOAD_SECONDS = 300;
const PAGE = 1000; // events or lines in one answer
const MOST = 2000; // of a task's events and lines the newest are shown
const MOST_PAGES = 50;
const QUIET_SECONDS = 20; // heartbeats come every 15 s
const SILENCE_SECONDS = 40;
const EVENTS = ["task.accepted", "task.running", "task.checkpoint", "task.completed", "task.failed", "task.cancelled", "credits.updated"];

/** A refused request. The message is the problem document's, to be displayed; `isQuoted`: in the gateway's words. */
export class Refused extends Error {
  constructor(status, problem) {
    const fields = (problem.fields ?? []).map(({ field, message }) => `${field}: ${message}`);
    super([problem.detail ?? say("gateway.status", { status }), ...fields].join("\n"));
    this.status = status;
    this.isQuoted = Boolean(problem.code);
  }
}

/** No answer. `isFrozen`: the gateway took the request and stayed silent. */
export class Away extends Error {
  constructor(isFrozen, text = say(isFrozen ? "gateway.frozen" : "gateway.gone")) {
    super(text);
    this.isFrozen = isFrozen;
  }
}

/** Ids of orders that may have arrived, by kind and body: the same order, sent again, is the same task. */
const unanswered = new Map();
const NOT_REFUSED = [401, 403, 408, 425, 429]; // the order itself may have been taken before

const newId = (kind) => `${kind === "images" ? "image" : "training"}-${[...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;

/** A body; empty where it is no JSON, as that of a proxy's error. */
function read(text) {
  try {
    return parse(text);
  } catch {
    return {};
  }
}

export class Api {
  #token;

  constructor(token) {
    this.#token = token;
  }

  async #request(path, { type = "application/json", seconds = ANSWER_SECONDS, ...options } = {}) {
    const headers = { authorization: `Bearer ${this.#token}` };
    if (options.body) headers["content-type"] = type;
    const waited = new AbortController();
    const timer = setTimeout(() => waited.abort(), seconds * 1000);
    let answer;
    let body;
    try {
      answer = await fetch(path, { ...options, headers, signal: waited.signal, cache: "no-store" });
      body = read(await answer.text());
    } catch {
      throw new Away(waited.signal.aborted);
    } finally {
      clearTimeout(timer);
    }
    if (!answer.ok) throw new Refused(answer.status, body);
    return body;
  }

  /** Whatever was asked for may be done where no answer comes; asked for again it is done once. */
  async #post(path, body) {
    try {
      return await this.#request(TASKS + path, { method: "POST", body: stringify(body) });
    } catch (error) {
      throw error instanceof Away ? new Away(error.isFrozen, say("gateway.unanswered")) : error;
    }
  }

  #of(taskId, what) {
    return `/${encodeURIComponent(taskId)}${what}`;
  }

  #get(path) {
    return this.#request(TASKS + path);
  }

  tenant() {
    return this.#request("/api/v1/tenant");
  }

  templates() {
    return this.#request("/api/v1/templates");
  }

  datasets() {
    return this.#request("/api/v1/datasets");
  }

  /** The newest trainings that have made a model. */
  models() {
    return this.#get("?scene=model.train&status=completed&limit=100");
  }

  /** `filters`: {status, scene, text}, each may be empty. */
  list(filters, cursor) {
    const query = new URLSearchParams({ limit: "30" });
    for (const [name, value] of Object.entries({ ...filters, cursor })) if (value) query.set(name, value);
    return this.#get(`?${query}`);
  }

  task(taskId) {
    return this.#get(this.#of(taskId, ""));
  }

  /** The newest events of a task: {events, leftOut}. */
  async events({ task_id, last_seq }) {
    const leftOut = Math.max(0, last_seq - MOST);
    const events = [];
    for (let n = 0; n < MOST_PAGES; n++) {
      const page = await this.#get(this.#of(task_id, `/events?limit=${PAGE}&after=${events.at(-1)?.seq ?? leftOut}`));
      events.push(...page);
      if (page.length < PAGE) break;
    }
    return { events, leftOut };
  }

  /** The newest lines after a place, and the place where they end: {lines, leftOut, after}. */
  async trainingLog(taskId, after) {
    let [lines, leftOut] = [[], 0];
    for (let n = 0; n < MOST_PAGES; n++) {
      const page = await this.#get(this.#of(taskId, `/training-log?limit=${PAGE}&after=${after}`));
      after = page.after;
      leftOut += Math.max(0, lines.length + page.lines.length - MOST);
      lines = [...lines, ...page.lines].slice(-MOST);
      if (page.lines.length < PAGE) break;
    }
    return { lines, leftOut, after };
  }

  /** An order keeps its id until it is answered: somebody presses again, and it is one task. */
  async start(kind, order) {
    const named = `${kind} ${stringify(order)}`;
    if (!unanswered.has(named)) unanswered.set(named, newId(kind));
    try {
      const task = await this.#post(`/${kind}`, { ...order, task_id: unanswered.get(named) });
      unanswered.delete(named);
      return task;
    } catch (error) {
      if (error instanceof Refused && error.status < 500 && !NOT_REFUSED.includes(error.status)) unanswered.delete(named);
      throw error;
    }
  }

  /** `kind`: what the file is said to be; another one is refused. */
  upload(file, kind) {
    const path = `${UPLOADS}?${new URLSearchParams({ kind })}`;
    return this.#request(path, { method: "POST", body: file, type: "application/octet-stream", seconds: UPLOAD_SECONDS });
  }

  cancel(taskId) {
    return this.#post(this.#of(taskId, "/cancel"), { reason: "cancelled on the live page" });
  }

  confirm(taskId, maxCredits) {
    return this.#post(this.#of(taskId, "/confirm-price"), { max_credits: maxCredits });
  }

  streamConfig() {
    return this.#get("/stream/config");
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
  #listening = null;
  #online = null;
  #isStopped = false;

  /** `listener`: {event(event), live(), heard(), quiet(seconds), waiting(seconds), away(error), refused(error)} */
  constructor(api, listener) {
    this.#api = api;
    this.#listener = listener;
    this.#listening = setInterval(() => this.#listenForSilence(), 1000);
    this.#online = () => this.#again(0);
    addEventListener("online", this.#online);
  }

  /** For good. */
  stop() {
    this.#isStopped = true;
    this.#close();
    clearInterval(this.#listening);
    removeEventListener("online", this.#online);
  }

  async open() {
    this.#close();
    let config;
    try {
      config = await this.#api.streamConfig();
      if (this.#isStopped) return;
    } catch (error) {
      if (this.#isStopped) return;
      if (error instanceof Refused && [401, 403].includes(error.status)) this.#listener.refused(error);
      else {
        if (error instanceof Away) this.#listener.away(error);
        this.#again();
      }
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
    source.addEventListener("system.heartbeat", () => this.#heard());
    for (const type of EVENTS) {
      source.addEventListener(type, ({ data }) => {
        this.#heard();
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

  #heard() {
    this.#heardAt = Date.now();
    this.#listener.heard();
  }

  #listenForSilence() {
    const seconds = Math.floor((Date.now() - this.#heardAt) / 1000);
    if (!this.#source || seconds <= QUIET_SECONDS) return;
    if (seconds > SILENCE_SECONDS) this.#again(0);
    else this.#listener.quiet(seconds);
  }
}
