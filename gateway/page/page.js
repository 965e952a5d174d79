// The page: token, header, list, stream, form.

import { Api, Away, Live, Refused } from "./api.js";
import { Card } from "./card.js";
import { drawDetail } from "./detail.js";
import { StartForm } from "./form.js";
import { Large } from "./results.js";
import { LANGUAGES, choose, fill, instant, language, say } from "./words.js";

const TOKEN = "comfyui-temporal.token";
const MAX_CARDS = 500;
const REFRESH_MILLISECONDS = 250;
const SEARCH_MILLISECONDS = 250;
const TENANT_MILLISECONDS = 1_000;
const QUIET_MILLISECONDS = 10_000; // an open task without events: what delays it is in the task, not in its events
const MAX_QUIET = 20;
const READING_PIXELS = 120;
const CHANGES = ["start_image_task", "start_training_task", "cancel_task", "confirm_price"];

const $ = (id) => document.getElementById(id);
const cards = new Map();
const refreshing = new Map();
const arrived = new Map();
let api;
let live;
let form;
let large;
let links = {};
let tenant = null;
let isTyped = false; // the token: then the address names a task of whoever was here before
let views = 0; // how often the list was loaded; pages of an earlier one are dropped
let tenantTimer = null;
let cursor = null;
let detailed = null;

/** From the address, which is cleared immediately; else from this tab's storage. */
function givenToken() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.get("token")) {
    sessionStorage.setItem(TOKEN, given.get("token"));
    given.delete("token");
    history.replaceState(null, "", location.pathname + location.search + (given.size ? `#${given}` : ""));
  }
  return sessionStorage.getItem(TOKEN);
}

function askForToken(error) {
  live?.stop();
  sessionStorage.removeItem(TOKEN);
  connection("closed", say("connection.closed"));
  $("entry").hidden = false;
  problem(new Error(say(error.status === 403 ? "token.forbidden" : "token.refused")));
}

function connection(state, text) {
  if ($("connection").textContent === text) return;
  $("connection").dataset.state = state;
  $("connection").textContent = text;
}

function problem(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message : "";
  $("problem").lang = error?.isQuoted ? "en" : language;
}

function away(error) {
  $("away").hidden = !error;
  $("away").textContent = error ? error.message : "";
}

/** Run it and show its error. */
async function attempt(act) {
  try {
    const done = await act();
    problem(null);
    return done;
  } catch (error) {
    if (error instanceof Refused && error.status === 401) askForToken(error);
    else problem(error instanceof Refused || error instanceof Away ? error : new Error(say("page.broken", { reason: error.message })));
    return undefined;
  }
}

const actions = {
  may: (operation) => !tenant || tenant.operations.includes(operation),
  cancel: (taskId) => attempt(async () => {
    const { outcome } = await api.cancel(taskId);
    if (outcome === "too_late") throw new Refused(200, { detail: say("too_late", { task: taskId }) });
  }),
  confirm: (taskId, points) => attempt(() => api.confirm(taskId, points)),
  /** Order the same again, with changes. The list's input may lack files: the task's is whole. Returns whether it began. */
  again: (task, changes) => attempt(async () => {
    const { input } = await api.task(task.task_id);
    const kind = task.scene === "image.generate" ? "images" : "trainings";
    started(await api.start(kind, { ...input, ...changes }));
    return true;
  }),
  trainingLog: (taskId, after) => api.trainingLog(taskId, after),
  large: (card, addresses, n) => large.open(card, addresses, n),
  /** Fill the form in for an image with this training's model. */
  use: (training) => attempt(async () => {
    if (detailed) {
      const routed = new Promise((done) => addEventListener("hashchange", done, { once: true }));
      location.hash = "";
      await routed;
    }
    $("start").open = true;
    if (!(await form.use(training))) throw new Refused(200, { detail: say("start.lora.nowhere") });
  }),
};

function started(task) {
  $("started").textContent = say("start.done", { task: task.task_id });
  refresh(task.task_id, { isOwn: true });
}

const filters = () => ({ status: $("filter").value, scene: $("scene").value, text: $("search").value.trim() });

function matches(task) {
  const { status, scene, text } = filters();
  const wanted = text.toLowerCase();
  const has = !text || [task.task_id, task.input?.prompt ?? ""].some((part) => part.toLowerCase().includes(wanted));
  return (!status || task.status === status) && (!scene || task.scene === scene) && has;
}

/** Put a card where it belongs: on top while it needs somebody, else newest first. */
function put(card) {
  const list = $(card.needsYou ? "needs-list" : "list");
  if (card.item.parentElement === list) return;
  const isFirstOf = (other) => other.createdAt < card.task.created_at || (other.createdAt === card.task.created_at && other.taskId < card.task.task_id);
  card.item.createdAt = card.task.created_at;
  card.item.taskId = card.task.task_id;
  // Mostly the oldest (a page of the list) or the newest (an event).
  const last = list.lastElementChild;
  const later = last && isFirstOf(last) ? [...list.children].find(isFirstOf) : null;
  list.insertBefore(card.item, later ?? null);
  $("needs").hidden = !$("needs-list").children.length;
}

function place(task, isNew) {
  const known = cards.get(task.task_id);
  if (known) {
    known.is(task);
    put(known);
    return known;
  }
  const card = new Card(task, actions, links);
  cards.set(task.task_id, card);
  put(card);
  if (isNew) card.item.firstElementChild.dataset.new = "";
  return card;
}

/** Whether somebody reads or acts further down: then new tasks wait behind a button, and no card moves. */
const isReading = () => scrollY > READING_PIXELS || $("list").contains(document.activeElement);

function showArrived() {
  $("arrived").hidden = !arrived.size;
  $("arrived").textContent = say("list.new", { n: arrived.size });
}

function takeArrived() {
  for (const task of arrived.values()) place(task, true);
  arrived.clear();
  showArrived();
  trim();
}

function forget(card) {
  card.item.remove();
  cards.delete(card.task.task_id);
  $("needs").hidden = !$("needs-list").children.length;
}

function trim() {
  $("none").hidden = cards.size > 0;
  $("none").textContent = say(Object.values(filters()).some(Boolean) ? "list.none.found" : "list.none");
  while ($("list").children.length > MAX_CARDS) forget(cards.get($("list").lastElementChild.taskId));
}

/** Read a task again, once for several events in a short time. */
function refresh(taskId, { isOwn = false } = {}) {
  if (refreshing.has(taskId)) return;
  refreshing.set(taskId, setTimeout(async () => {
    refreshing.delete(taskId);
    try {
      const task = await api.task(taskId);
      const known = cards.get(taskId);
      if (!matches(task)) return void (known && forget(known));
      // A price that waits is shown at once: it stands above the list.
      if (!known && !isOwn && !task.confirmation && isReading()) {
        arrived.set(taskId, task);
        return void showArrived();
      }
      arrived.delete(taskId);
      showArrived();
      await place(task, !known).drawLoss();
      trim();
    } catch (error) {
      if (error instanceof Away) setTimeout(() => refresh(taskId), 2000);
      else if (!(error instanceof Refused)) problem(new Error(say("page.broken", { reason: error.message })));
    }
  }, REFRESH_MILLISECONDS));
}

function lookAtQuietOnes() {
  if (document.hidden || !api) return;
  const before = Date.now() - QUIET_MILLISECONDS;
  const quiet = [...cards.values()].filter((card) => !card.isOver && card.shownAt < before);
  for (const card of quiet.slice(0, MAX_QUIET)) refresh(card.task.task_id);
}

function happened(event) {
  readTenantSoon();
  if (detailed === event.task_id) showDetailSoon();
  const card = cards.get(event.task_id);
  if (card && !card.apply(event)) return;
  // Credits, exceptions and the input of a new task are in the task, not in its events.
  refresh(event.task_id);
}

/** The newest tasks. What is shown stays where it is, unless tasks between it and the newest may be missing. */
async function load({ older = false, anew = false } = {}) {
  if (anew) views += 1;
  const view = views;
  const page = await api.list(filters(), older ? cursor : null);
  if (view !== views) return;
  const isGap = !older && page.cursor && !page.tasks.some(({ task_id }) => cards.has(task_id));
  if (isGap) views += 1;
  if (anew || isGap) for (const card of [...cards.values()]) forget(card);
  if (!older && !anew && !isGap) [...cards.values()].filter((card) => !card.isOver).forEach((card) => refresh(card.task.task_id));
  if (older || anew || isGap || cursor === null) cursor = page.cursor;
  let unshown = null;
  for (const task of page.tasks) {
    try {
      const card = place(task, false);
      if (task.status === "failed" || task.confirmation || task.scene === "model.train") refresh(task.task_id);
      card.showTime();
    } catch (error) {
      unshown = error; // the others are shown all the same
    }
  }
  // What delays a task is not in the list: whoever opens the page in an outage need not wait to see it.
  const open = page.tasks.map(({ task_id }) => cards.get(task_id)).filter((card) => card && !card.isOver);
  for (const card of open.slice(0, MAX_QUIET)) refresh(card.task.task_id);
  $("older").hidden = !cursor;
  trim();
  if (unshown) throw unshown;
}

async function readTenant() {
  const asked = api;
  let found;
  try {
    found = await api.tenant();
  } catch {
    return; // the stream says what is wrong
  }
  if (asked !== api) return;
  // Nothing of another tenant or user stays: cards, what is on its way, the form's choices.
  if (tenant && (tenant.tenant_id !== found.tenant_id || tenant.user_id !== found.user_id)) return startAgain();
  tenant = found;
  const { tenant_id, balance, balance_at, running, queued, operations } = tenant;
  const parts = [["name", tenant_id], ["running", say("tenant.running", { n: running })], ["queued", say("tenant.queued", { n: queued })]];
  if (balance !== null) parts.splice(1, 0, ["balance", say("tenant.balance", { points: balance })]);
  $("tenant").replaceChildren(...parts.map(([className, textContent]) => Object.assign(document.createElement("span"), { className, textContent })));
  if (balance_at) $("tenant").querySelector(".balance").title = say("tenant.balance.title", { time: instant(balance_at) });
  $("tenant").hidden = false;
  const mayStart = ["start_image_task", "start_training_task"].some((operation) => operations.includes(operation));
  $("start").hidden = !mayStart;
  $("readonly").hidden = CHANGES.some((operation) => operations.includes(operation));
  temporalLink(tenant_id);
}

/** With the token of this tab, as if the page had just been opened. */
function startAgain() {
  live?.stop();
  $("all").hidden = $("detail").hidden = true;
  if (isTyped) history.replaceState(null, "", location.pathname + location.search);
  location.reload();
  return new Promise(() => {});
}

function readTenantSoon() {
  tenantTimer ??= setTimeout(() => {
    tenantTimer = null;
    readTenant();
  }, TENANT_MILLISECONDS);
}

/** The list of runs in the Temporal UI, narrowed to this tenant's tasks. */
function temporalLink(tenantId) {
  if (!links.temporal_ui_url) return;
  const query = `TenantId = '${tenantId}' AND WorkflowType IN ('ImageGenerationWorkflow', 'TrainingWorkflow')`;
  const base = `${links.temporal_ui_url.replace(/\/$/, "")}/namespaces/${encodeURIComponent(links.namespace)}`;
  $("temporal").href = `${base}/workflows?${new URLSearchParams({ query })}`;
  $("temporal").hidden = false;
}

let detailTimer = null;

function showDetailSoon() {
  detailTimer ??= setTimeout(() => {
    detailTimer = null;
    showDetail();
  }, REFRESH_MILLISECONDS);
}

async function showDetail() {
  const taskId = detailed;
  if (!taskId || !api) return;
  const shown = await attempt(async () => {
    const [task, log] = await Promise.all([api.task(taskId), api.trainingLog(taskId, 0)]);
    return { task, history: await api.events(task), log };
  });
  if (!shown || taskId !== detailed) return;
  const card = drawDetail($("detail-body"), shown, actions, links);
  await attempt(() => card.drawLoss());
}

/** The task in the address has the page to itself. */
function route() {
  detailed = new URLSearchParams(location.hash.slice(1)).get("task");
  $("detail").hidden = !detailed;
  $("all").hidden = Boolean(detailed);
  $("detail-body").replaceChildren();
  if (detailed) {
    $("detail").focus();
    showDetail();
  }
}

async function begin(token) {
  api = new Api(token);
  $("entry").hidden = true;
  links = await fetch("/page/settings.json").then((answer) => answer.json()).catch(() => ({}));
  await readTenant();
  live?.stop();
  live = new Live(api, {
    event: happened,
    live: () => {
      connection("live", say("connection.live"));
      away(null);
      // The stream first, then the list: a change in between is in both, and none is missed.
      for (const card of cards.values()) card.doubt();
      readTenant().then(() => attempt(load));
    },
    heard: () => {
      connection("live", say("connection.live"));
      away(null);
    },
    quiet: (seconds) => connection("waiting", say("connection.quiet", { seconds })),
    waiting: (seconds) => connection("waiting", seconds ? say("connection.retrying", { seconds }) : say("connection.connecting")),
    away,
    refused: askForToken,
  });
  connection("waiting", say("connection.connecting"));
  live.open();
  if (detailed) showDetail();
}

function wireForms() {
  $("token-form").onsubmit = (submitted) => {
    submitted.preventDefault();
    sessionStorage.setItem(TOKEN, $("token").value.trim());
    $("token").value = "";
    problem(null);
    isTyped = true;
    begin(sessionStorage.getItem(TOKEN));
  };
  form = new StartForm({
    tasks: () => [...cards.values()].map(({ task }) => task),
    // Whatever is wrong with the list, a task can be started without it.
    templates: () => api.templates().then(({ templates }) => templates, () => null),
    datasets: () => api.datasets().then(({ datasets }) => datasets, () => []),
    models: () => api.models().then(({ tasks }) => tasks.filter(({ output }) => output?.model_path), () => []),
    upload: (file, kind) => attempt(() => api.upload(file, kind)),
    start: async (kind, order) => {
      $("started").textContent = "";
      const task = await attempt(() => api.start(kind, order));
      if (task) started(task);
    },
  });
  $("start").ontoggle = () => $("start").open && form.opened();
}

function wireList() {
  let typing;
  const anew = () => {
    arrived.clear();
    showArrived();
    if (api) attempt(() => load({ anew: true }));
  };
  $("search").oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(anew, SEARCH_MILLISECONDS);
  };
  $("filter").onchange = $("scene").onchange = anew;
  $("older").onclick = () => attempt(() => load({ older: true }));
  $("arrived").onclick = () => {
    takeArrived();
    $("tasks").focus();
    $("tasks").scrollIntoView();
  };
  setInterval(() => cards.forEach((card) => card.isOver || card.isAway || card.showTime()), 1000);
  setInterval(lookAtQuietOnes, QUIET_MILLISECONDS);
}

function wireLanguage() {
  for (const [value, textContent] of Object.entries(LANGUAGES)) {
    $("language").append(Object.assign(document.createElement("option"), { value, textContent, lang: value, selected: value === language }));
  }
  $("language").onchange = () => choose($("language").value);
}

fill(document);
connection("closed", say("connection.closed"));
large = new Large();
wireForms();
wireList();
wireLanguage();
const token = givenToken();
route();
addEventListener("hashchange", () => {
  const had = sessionStorage.getItem(TOKEN);
  const given = givenToken();
  if (given && given !== had) {
    isTyped = false;
    begin(given);
  }
  route();
});
if (token) begin(token);
else $("entry").hidden = false;
