// The page: token, list, stream, form.

import { Api, Live, Refused } from "./api.js";
import { Card } from "./card.js";

const TOKEN = "comfyui-temporal.token";
const MAX_CARDS = 300;
const REFRESH_MILLISECONDS = 250;
const QUIET_MILLISECONDS = 10_000; // an open task without events: what delays it is in the task, not in its events
const MAX_QUIET = 20;

const $ = (id) => document.getElementById(id);
const cards = new Map();
const refreshing = new Map();
let api;
let links = {};
let cursor = null;

/** From the address, which is cleared immediately; else from this tab's storage. */
function givenToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(TOKEN, given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return sessionStorage.getItem(TOKEN);
}

function askForToken(why) {
  sessionStorage.removeItem(TOKEN);
  connection("closed", "not connected");
  $("entry").hidden = false;
  problem(why);
}

function connection(state, text) {
  $("connection").dataset.state = state;
  $("connection").textContent = text;
}

function problem(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message ?? String(error) : "";
}

/** Run it and show its error. */
async function attempt(act) {
  try {
    const done = await act();
    problem(null);
    return done;
  } catch (error) {
    problem(error instanceof Refused ? error : new Error("The gateway cannot be reached: try again."));
    return undefined;
  }
}

const actions = {
  cancel: (taskId) => attempt(async () => {
    const { outcome } = await api.cancel(taskId);
    if (outcome === "too_late") throw new Refused(200, { detail: `${taskId} was delivered or had ended first.` });
  }),
  confirm: (taskId, points) => attempt(() => api.confirm(taskId, points)),
  trainingLog: (taskId, after) => api.trainingLog(taskId, after),
};

function place(task, isNew) {
  const known = cards.get(task.task_id);
  if (known) {
    known.is(task);
    return known;
  }
  if (!cards.size) temporalLink(task.tenant_id);
  const card = new Card(task, actions, links);
  cards.set(task.task_id, card);
  const later = [...cards.values()].find((other) => other !== card && other.item.isConnected && other.task.created_at < task.created_at && isFirst(other, task));
  if (later) later.item.before(card.item);
  else $("list").append(card.item);
  if (isNew) card.item.firstElementChild.dataset.new = "";
  return card;
}

/** Whether `other` is the first in the list that is older than `task`. */
function isFirst(other, task) {
  const before = other.item.previousElementSibling;
  const card = before && [...cards.values()].find(({ item }) => item === before);
  return !card || card.task.created_at >= task.created_at;
}

function forget(card) {
  card.item.remove();
  cards.delete(card.task.task_id);
}

function trim() {
  $("none").hidden = cards.size > 0;
  while ($("list").children.length > MAX_CARDS) {
    const oldest = $("list").lastElementChild;
    forget([...cards.values()].find(({ item }) => item === oldest));
  }
}

/** Read a task again, once for several events in a short time. */
function refresh(taskId) {
  if (refreshing.has(taskId)) return;
  refreshing.set(taskId, setTimeout(async () => {
    refreshing.delete(taskId);
    try {
      const task = await api.task(taskId);
      const wanted = $("filter").value;
      const known = cards.get(taskId);
      if (wanted && task.status !== wanted) return void (known && forget(known));
      await place(task, !known).drawLoss();
      trim();
    } catch (error) {
      if (!(error instanceof Refused)) setTimeout(() => refresh(taskId), 2000);
    }
  }, REFRESH_MILLISECONDS));
}

function lookAtQuietOnes() {
  if (document.hidden || !api) return;
  const since = Date.now() - QUIET_MILLISECONDS;
  const quiet = [...cards.values()].filter((card) => !card.isOver && card.shownAt < since);
  for (const card of quiet.slice(0, MAX_QUIET)) refresh(card.task.task_id);
}

function happened(event) {
  const card = cards.get(event.task_id);
  if (card && !card.apply(event)) return;
  // Credits, exceptions and the input of a new task are in the task, not in its events.
  refresh(event.task_id);
}

async function load({ older = false } = {}) {
  const page = await api.list($("filter").value, older ? cursor : null);
  cursor = page.cursor;
  if (!older) {
    const shown = new Set(page.tasks.map(({ task_id }) => task_id));
    for (const card of [...cards.values()]) if (!shown.has(card.task.task_id)) forget(card);
  }
  for (const task of page.tasks) {
    const card = place(task, false);
    if (task.status === "failed" || task.confirmation || task.scene === "model.train") refresh(task.task_id);
    card.showTime();
  }
  $("older").hidden = !cursor;
  trim();
}

/** The list of runs in the Temporal UI, narrowed to tasks: of this tenant, once one of its tasks is known. */
function temporalLink(tenantId) {
  if (!links.temporal_ui_url) return;
  const types = "WorkflowType IN ('ImageGenerationWorkflow', 'TrainingWorkflow')";
  const query = tenantId ? `TenantId = '${tenantId}' AND ${types}` : types;
  const base = `${links.temporal_ui_url.replace(/\/$/, "")}/namespaces/${encodeURIComponent(links.namespace)}`;
  $("temporal").href = `${base}/workflows?${new URLSearchParams({ query })}`;
}

async function begin(token) {
  api = new Api(token);
  $("entry").hidden = true;
  links = await fetch("/page/settings.json").then((answer) => answer.json()).catch(() => ({}));
  if (links.temporal_ui_url) {
    temporalLink();
    $("temporal").hidden = false;
  }
  const live = new Live(api, {
    event: happened,
    live: () => {
      connection("live", "live");
      // The stream first, then the list: a change in between is in both, and none is missed.
      attempt(load);
    },
    waiting: (seconds) => connection("waiting", seconds ? `disconnected; retrying in ${seconds} s` : "connecting"),
    refused: askForToken,
  });
  connection("waiting", "connecting");
  live.open();
}

function orderOf(form) {
  const given = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ""));
  const { kind, template_id, priority } = given;
  const order = { template_id, priority };
  if (given.max_credits) order.max_credits = Number(given.max_credits);
  if (kind === "images") {
    Object.assign(order, { prompt: given.prompt, resolution: given.resolution });
    if (given.seed) order.extras = { seed: Number(given.seed) };
  } else {
    const { base_model, dataset_id, source_uri, epochs, batch_size, learning_rate } = given;
    const hyperparameters = { epochs: Number(epochs), batch_size: Number(batch_size), learning_rate: Number(learning_rate) };
    Object.assign(order, { base_model, dataset: { dataset_id, source_uri }, hyperparameters });
  }
  return [kind, order];
}

function wire() {
  $("token-form").onsubmit = (submitted) => {
    submitted.preventDefault();
    sessionStorage.setItem(TOKEN, $("token").value.trim());
    $("token").value = "";
    problem(null);
    begin(sessionStorage.getItem(TOKEN));
  };
  const form = $("start-form");
  form.elements.kind.onchange = () => {
    for (const fields of form.querySelectorAll("fieldset")) {
      fields.hidden = fields.disabled = fields.dataset.kind !== form.elements.kind.value;
    }
    form.elements.template_id.value = form.elements.kind.value === "images" ? "text-to-image" : "lora-train";
  };
  form.onsubmit = async (submitted) => {
    submitted.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    const task = await attempt(() => api.start(...orderOf(form)));
    button.disabled = false;
    $("started").textContent = task ? `${task.task_id} started` : "";
    if (task) refresh(task.task_id);
  };
  $("filter").onchange = () => attempt(load);
  $("older").onclick = () => attempt(() => load({ older: true }));
  setInterval(() => cards.forEach((card) => card.isOver || card.showTime()), 1000);
  setInterval(lookAtQuietOnes, QUIET_MILLISECONDS);
}

wire();
const token = givenToken();
if (token) begin(token);
else $("entry").hidden = false;
