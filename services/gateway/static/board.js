"use strict";

const EACH_MS = 2000;
const el = (id) => document.getElementById(id);
const key = { get: () => sessionStorage.getItem("calm-key"), set: (value) => sessionStorage.setItem("calm-key", value) };

const number = (value, digits = 0, unit = "") =>
  value === null || value === undefined ? "" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) + unit;
const seconds = (value) => number(value, 2, " s");
const joules = (value, estimated) => number(value, 1, estimated ? " J (est.)" : " J");
const bytes = (value) => (value >= 1e9 ? number(value / 1e9, 2, " GB") : number(value / 1e6, 0, " MB"));
const moment = (unix) => (unix ? new Date(unix * 1000).toLocaleTimeString() : "");

/** Fill a table. A column is [title, kind]; a cell a string or an element; a row may have the class `sub`. */
function fill(table, columns, rows, empty) {
  const head = document.createElement("tr");
  for (const [title, kind] of columns) {
    const cell = document.createElement("th");
    cell.textContent = title;
    if (kind) cell.className = kind;
    head.append(cell);
  }
  const lines = rows.map(({ cells, sub }) => {
    const line = document.createElement("tr");
    if (sub) line.className = "sub";
    cells.forEach((value, n) => {
      const cell = document.createElement("td");
      if (columns[n][1]) cell.className = columns[n][1];
      cell.append(value ?? "");
      line.append(cell);
    });
    return line;
  });
  if (!lines.length) {
    const line = document.createElement("tr");
    const cell = document.createElement("td");
    cell.colSpan = columns.length;
    cell.textContent = empty;
    line.append(cell);
    lines.push(line);
  }
  table.replaceChildren(head, ...lines);
}

const N = "number";

function show(fleet) {
  const state = el("state");
  state.textContent = fleet.missing ? `not ready: ${fleet.missing}` : "ready";
  state.className = fleet.missing ? "bad" : "";
  const c = fleet.counts;
  el("counts").textContent = c
    ? `${number(c.accepted)} accepted, ${number(c.answered)} answered, ${number(c.failed)} failed, ${number(c.in_flight)} in flight, ` +
      `${number(c.loads)} loads, ${number(c.evictions)} evictions`
    : "the knowledge base does not answer";

  fill(el("workers"), [["worker, model"], ["device, state", "wrap"], ["memory", N], ["in use", N], ["tokens/s each", N]],
    fleet.workers.flatMap((w) => [
      { cells: [w.worker, w.device + (w.draining ? ", leaving" : ""), `${bytes(w.used_bytes)} of ${bytes(w.budget_bytes)}`, "", ""] },
      ...w.engines.map((e) => ({
        sub: true,
        cells: [e.artifact, e.state, bytes(e.footprint_bytes), `${e.active} of ${e.slots}`, number(e.tokens_per_s)],
      })),
    ]), "no worker is running");

  fill(el("models"), [["model"], ["answered", N], ["p50", N], ["p95", N], ["first token", N], ["energy", N], ["feedback", N]],
    fleet.models.map(({ card, answered_in_all, recent: r }) => ({
      cells: [card, number(answered_in_all), ...(r
        ? [seconds(r.latency_p50_s), seconds(r.latency_p95_s), seconds(r.ttft_p50_s), joules(r.energy_j_mean), r.feedback_count ? number(r.feedback_mean, 2) : ""]
        : ["", "", "", "", ""])],
    })), "the models are not known yet");

  fill(el("queues"), [["model"], ["queries", N]],
    Object.entries(fleet.queues).map(([artifact, count]) => ({ cells: [artifact, number(count)] })), "nothing waits or runs");

  fill(el("energy"), [["worker"], ["answers", N], ["loads", N], ["idle", N], ["others", N], ["meter", N], ["known by"]],
    fleet.energy.map((e) => ({
      cells: [e.worker, ...[e.active_j, e.load_j, e.idle_j, e.other_j, e.total_j].map((j) => number(j, 0, " J")), e.source === "model" ? "estimate" : e.source],
    })), "no worker has reported yet");

  fill(el("decisions"), [["at"], ["model"], ["latency", N], ["energy", N], ["tokens", N], ["why", "text"], ["feedback", N], ["query"]],
    fleet.decisions.map((d) => ({
      cells: [moment(d.at), d.error ? `${d.model} ${d.error}` : d.model, seconds(d.latency_s), joules(d.energy_j, d.estimated), number(d.tokens_out),
        d.why || d.state, d.feedback.map((f) => number(f, 2)).join(", "), explainer(d.id)],
    })), "nothing has been asked yet");

  fill(el("services"), [["service"], ["instance"], ["state"], ["in flight", N], ["handled", N], ["failed", N], ["", "text"]],
    fleet.services.map((s) => ({ cells: [s.service, s.instance, s.state, number(s.in_flight), number(s.handled), number(s.failed), s.detail] })),
    "no service is running");
}

function explainer(id) {
  const button = document.createElement("button");
  button.className = "link";
  button.textContent = id.slice(0, 12);
  button.title = id;
  button.addEventListener("click", () => explain(id).catch((error) => tell(error.message)));
  return button;
}

async function explain(id) {
  const record = await (await ask(`v1/queries/${encodeURIComponent(id)}`)).json();
  const section = el("explained");
  const weights = Object.entries(record.weights ?? {}).map(([name, value]) => `${name} ${number(value, 2)}`).join(", ");
  section.querySelector("h2").textContent = `Why ${record.model} (${record.id})`;
  section.querySelector("p").textContent = [record.why, record.flip, weights && `Weights: ${weights}`]
    .filter(Boolean).map((text) => text.replace(/\.?$/, ".")).join(" ");
  fill(section.querySelector("table"),
    [["model"], ["utility", N], ["quality", N], ["latency", N], ["energy", N], ["terms", "text"]],
    (record.candidates ?? []).map((c) => ({
      cells: [c.card, ...(c.excluded
        ? ["", "", "", "", `excluded: ${c.excluded}`]
        : [number(c.utility, 3), number(c.quality, 3), seconds(c.latency_s), joules(c.energy_j),
            Object.entries(c.terms ?? {}).map(([name, value]) => `${name} ${number(value, 3)}`).join(", ")])],
    })), "no candidates are on record");
  section.hidden = false;
  section.scrollIntoView({ block: "nearest" });
}

async function ask(path) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const response = await fetch(path, { headers, cache: "no-store" });
  if (response.status === 401) el("key").hidden = false;
  if (!response.ok) throw new Error((await response.json()).error?.message ?? response.statusText);
  return response;
}

function tell(text) {
  el("state").textContent = text;
  el("state").className = "bad";
}

async function refresh() {
  try {
    show(await (await ask("v1/fleet")).json());
    document.querySelector("main").hidden = false;
    el("key").hidden = true;
  } catch (error) {
    tell(error instanceof TypeError ? "the gateway does not answer" : error.message);
  }
  setTimeout(refresh, EACH_MS);
}

el("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(new FormData(event.target).get("key"));
});
refresh();
