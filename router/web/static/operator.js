// The operator's page: asks GET /cluster once a second and shows what it says.

import { Problem, callJson, pause } from "./api.js";
import { byId, make, shortTime } from "./dom.js";
import { askForKey } from "./key_dialog.js";
import { Plot } from "./plot.js";
import { Rates, median } from "./rates.js";
import { showStory } from "./story.js";
import { fillTable, meter, under } from "./tables.js";

const LOOK_SECONDS = 1;
const GONE_SECONDS = 60; // how long a replica that is no more is shown
const MOST_EVENTS = 12;

const whole = (value) => Math.round(value).toLocaleString();
const brief = (value) => (value >= 10_000 ? `${(value / 1000).toFixed(0)}k` : value < 10 && value % 1 ? value.toFixed(1) : whole(value));
const percent = (value) => `${Math.round(value)} %`;

const plots = {
  tokens: new Plot(byId("plot-tokens"), "Tokens a second, prompts and answers", { format: brief, least: 10 }),
  first: new Plot(byId("plot-first"), "Time to the first token", { format: shortTime, least: 0.01, dots: true }),
  queues: new Plot(byId("plot-queues"), "Requests", { format: brief, least: 5 }),
  cache: new Plot(byId("plot-cache"), "KV cache in use", { format: percent, least: 10, most: 100 }),
};
const rates = new Rates();
const known = new Map(); // replicas by id: what was last seen, and since when they are gone
const seenEnds = new Set();
const events = [];
let names = new Map(); // short names of replicas
let paused = false;
let locked = false; // nothing is asked for until there is another key
let pressed = false; // a button of a table that is drawn anew under the pointer would hear no click
let first = true;

// --- what happened ---

function note(text) {
  events.unshift({ at: new Date(), text });
  events.length = Math.min(events.length, MOST_EVENTS);
  const item = ({ at, text: said }) => make("li", {}, make("time", {}, at.toLocaleTimeString()), make("span", {}, said));
  byId("events").querySelector("ol").replaceChildren(...events.map(item));
}

function follow(replicas, now) {
  for (const replica of replicas) {
    const before = known.get(replica.id);
    if (!before) note(first ? `${short(replica.id)} is ${replica.state}` : `${short(replica.id)} came up: ${replica.state}`);
    else if (before.state !== replica.state) note(`${short(replica.id)} is ${replica.state}, was ${before.state}`);
    known.set(replica.id, { ...replica, goneAt: null });
  }
  const here = new Set(replicas.map((r) => r.id));
  for (const [id, replica] of known) {
    if (here.has(id)) continue;
    if (replica.goneAt === null) {
      note(`${short(id)} is gone`);
      known.set(id, { ...replica, state: "gone", goneAt: now });
    } else if (now - replica.goneAt > GONE_SECONDS) {
      known.delete(id);
    }
  }
  first = false;
}

/** The part of a replica's id that tells it from the others. */
function short(id) {
  return names.get(id) ?? id;
}

function shorten(replicas) {
  const ids = [...new Set([...known.keys(), ...replicas.map((r) => r.id)])];
  const length = [6, 8, 12, 99].find((n) => new Set(ids.map((id) => id.slice(0, n))).size === ids.length);
  names = new Map(ids.map((id) => [id, id.slice(0, length ?? 99)]));
}

// --- a look ---

function show(cluster) {
  const now = performance.now() / 1000;
  const { replicas, activity } = cluster;
  shorten(replicas);
  follow(replicas, now);
  const rate = rates.look(now - cluster.table_age, replicas);
  const ends = (activity.ended ?? []).filter((end) => !seenEnds.has(`${end.owner} ${end.id}`));
  ends.forEach((end) => seenEnds.add(`${end.owner} ${end.id}`));
  if (seenEnds.size > 5000) seenEnds.clear();
  showTiles(cluster, rate);
  showPlots(cluster, rate, ends, now);
  showReplicas(rate, now);
  showQueues(cluster);
  showRequests(activity);
  const fresh = cluster.connected && cluster.table_age < 5;
  link(fresh ? "good" : "warn", fresh ? "live" : `the dispatcher is away, as of ${shortTime(cluster.table_age)} ago`);
}

function totals({ replicas, waiting }, rate) {
  const sum = (of) => replicas.reduce((total, replica) => total + of(replica), 0);
  const blocks = sum((r) => r.total_blocks);
  const rated = replicas.map((r) => rate.get(r.id)).filter(Boolean);
  return {
    ready: replicas.filter((r) => r.state === "ready").length,
    running: sum((r) => (r.url ? r.leases : r.running)),
    queued: sum((r) => r.waiting) + Object.values(waiting).reduce((a, b) => a + b, 0),
    cache: blocks ? 1 - sum((r) => r.free_blocks) / blocks : null,
    tokens: rated.length ? rated.reduce((total, r) => total + r.tokens, 0) : null,
    steps: rated.length ? rated.reduce((total, r) => total + r.steps, 0) : null,
    asked: sum((r) => r.prefix_queries),
    found: sum((r) => r.prefix_hits),
  };
}

function showTiles(cluster, rate) {
  const all = totals(cluster, rate);
  const firsts = (cluster.activity.ended ?? []).map((end) => end.first_token_seconds);
  const count = cluster.replicas.length;
  const models = new Set(cluster.replicas.map((r) => r.model)).size;
  const slots = cluster.replicas.reduce((total, r) => total + r.max_num_seqs, 0);
  const tiles = [
    ["Replicas ready", `${all.ready} of ${count}`, `${models} model${models === 1 ? "" : "s"}`, all.ready < count || !count],
    ["Running", whole(all.running), `of ${whole(slots)} slots`],
    ["Waiting", whole(all.queued), all.queued ? "in queues and engines" : "nobody waits"],
    ["Tokens a second", all.tokens === null ? "–" : whole(all.tokens), all.steps === null ? "" : `${whole(all.steps)} steps a second`],
    ["First token", shortTime(median(firsts)), "median, done lately"],
    ["KV cache", all.cache === null ? "–" : percent(100 * all.cache), all.asked ? `${percent((100 * all.found) / all.asked)} of prompts found in it` : ""],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([name, value, more, bad]) =>
      make(
        "div",
        { className: bad ? "tile bad" : "tile" },
        make("div", { className: "name" }, name),
        make("div", { className: "value" }, value),
        make("div", { className: "more" }, more),
      ),
    ),
  );
}

function showPlots(cluster, rate, ends, now) {
  const all = totals(cluster, rate);
  const own = cluster.replicas.filter((r) => !r.url);
  const models = [...new Set(own.map((r) => r.model))].slice(0, 6);
  const byModel = (model) => own.filter((r) => r.model === model);
  const tokens = (model) => byModel(model).reduce((total, r) => total + (rate.get(r.id)?.tokens ?? 0), 0);
  plots.tokens.add(now, all.tokens === null ? {} : Object.fromEntries(models.map((m) => [m, tokens(m)])));
  const tiers = [...new Set(cluster.tiers.map((t) => t.tier))].slice(0, 5);
  const firsts = (tier) => ends.filter((e) => (tier ? e.tier === tier : true)).map((e) => e.first_token_seconds);
  plots.first.add(now, Object.fromEntries((tiers.length ? tiers : [""]).map((t) => [t || "each request", firsts(t)])));
  const counts = cluster.activity.tiers ?? [];
  const inTier = (tier) => counts.filter((t) => t.tier === tier).reduce((total, t) => total + t.waiting, 0);
  const queued = tiers.length ? tiers.map((t) => [`${t} waiting`, inTier(t)]) : [["waiting", all.queued]];
  plots.queues.add(now, Object.fromEntries([...queued, ["running", all.running]]));
  const used = own.slice(0, 6).filter((r) => r.total_blocks);
  plots.cache.add(now, Object.fromEntries(used.map((r) => [short(r.id), 100 * (1 - r.free_blocks / r.total_blocks)])));
}

const KINDS = { ready: "good", suspect: "warn", draining: "warn", gone: "bad" };

function showReplicas(rate, now) {
  const columns = [
    { name: "Replica", kind: "name", of: (r) => [r.url || short(r.id), under(r.model)] },
    {
      name: "State",
      of: (r) => [
        make("span", { className: `chip ${KINDS[r.state] ?? "quiet"}` }, r.state),
        under(r.goneAt === null ? "" : `${shortTime(now - r.goneAt)} ago`),
      ],
    },
    { name: "Ranks", of: (r) => ranks(r) },
    { name: "Running", kind: "figure", of: (r) => `${whole(r.url ? r.leases : r.running)} of ${whole(r.max_num_seqs)}` },
    { name: "Waiting", kind: "figure", of: (r) => whole(r.waiting) },
    { name: "KV cache", of: (r) => meter(r.total_blocks ? 1 - r.free_blocks / r.total_blocks : null) },
    { name: "Tokens/s", kind: "figure", of: (r) => figure(rate.get(r.id)?.tokens) },
    { name: "Steps/s", kind: "figure", of: (r) => figure(rate.get(r.id)?.steps) },
    { name: "Last step", kind: "figure", of: (r) => (r.since_step === null ? "none yet" : `${shortTime(r.since_step)} ago`) },
    { name: "Backlog", kind: "figure", of: (r) => [shortTime(r.backlog_seconds), under(`${whole(r.backlog_tokens)} tokens`)] },
  ];
  const rows = [...known.values()].sort((a, b) => a.model.localeCompare(b.model) || a.id.localeCompare(b.id));
  const rowClass = (r) => (r.goneAt === null ? "" : "gone");
  fillTable(byId("replicas"), columns, rows, { nothing: "No replica is up.", rowClass });
}

function figure(value) {
  return value === undefined ? "–" : whole(value);
}

function ranks({ ranks: places, host, url, pid }) {
  if (url) return "another server";
  const where = places.length ? places : [host];
  const nodes = [...new Set(where)].map((node) => `${node} × ${where.filter((n) => n === node).length}`);
  return [nodes.join(", "), under(`rank 0 is process ${pid}`)];
}

function showQueues({ tiers, activity }) {
  const counts = new Map((activity.tiers ?? []).map((t) => [`${t.model} ${t.tier}`, t]));
  const count = ({ model, tier }) => counts.get(`${model} ${tier}`) ?? { waiting: 0, running: 0 };
  const tierColumns = [
    { name: "Tier", kind: "name", of: (t) => t.tier },
    { name: "Model", of: (t) => t.model },
    { name: "Waiting", kind: "figure", of: (t) => whole(count(t).waiting) },
    { name: "Leased", kind: "figure", of: (t) => whole(count(t).running) },
    { name: "Oldest", kind: "figure", of: (t) => (t.waiting ? shortTime(t.oldest_seconds) : "–") },
    { name: "One more would wait", kind: "figure", of: (t) => (t.expected_seconds ? shortTime(t.expected_seconds) : "–") },
    { name: "Gap, of its bound", kind: "figure", of: (t) => (t.gap_bound ? `${whole(t.gap)} of ${whole(t.gap_bound)}` : "–") },
  ];
  fillTable(byId("tiers"), tierColumns, tiers, { nothing: "There are no tiers: first come, first served." });
  const userColumns = [
    { name: "User", kind: "name", of: (u) => u.user },
    { name: "Model", of: (u) => u.model },
    { name: "Tier", of: (u) => u.tier || "–" },
    { name: "Quota", kind: "figure", of: (u) => (u.quota === null ? "–" : u.quota ? whole(u.quota) : "what is left") },
    { name: "Waiting", kind: "figure", of: (u) => whole(u.waiting) },
    { name: "Leased", kind: "figure", of: (u) => whole(u.running) },
  ];
  fillTable(byId("users"), userColumns, activity.users ?? [], { nothing: "Nobody waits or is served.", more: activity.more_users });
}

function showRequests({ served = [], waiting = [], ended = [], more_served: more }) {
  const id = {
    name: "Request",
    kind: "name",
    of: (r) => (r.id ? opener(r.id) : "–"),
  };
  const who = { name: "Of", of: (r) => [[r.owner, r.user].filter(Boolean).join(" / "), under(r.tier && `tier ${r.tier}`)] };
  const servedColumns = [
    id,
    who,
    { name: "Model", of: (r) => r.model },
    { name: "Replica", of: (r) => short(r.replica) },
    { name: "For", kind: "figure", of: (r) => [shortTime(r.seconds), under(r.waited_seconds >= 0.05 ? `waited ${shortTime(r.waited_seconds)}` : "")] },
    { name: "Why", kind: "long", of: why },
  ];
  fillTable(byId("served"), servedColumns, served, { nothing: "Nobody is served at the moment.", more });
  const waitingColumns = [
    id,
    who,
    { name: "Model", of: (r) => r.model },
    { name: "Prompt", kind: "figure", of: (r) => `${whole(r.prompt_tokens)} tokens` },
    { name: "Waits for", kind: "figure", of: (r) => shortTime(r.seconds) },
  ];
  byId("waiting").hidden = waiting.length === 0;
  fillTable(byId("waiting"), waitingColumns, waiting, { nothing: "" });
  const endedColumns = [
    id,
    who,
    { name: "Ended", of: (r) => [r.outcome, under(r.ago === null ? "" : `${shortTime(r.ago)} ago`)] },
    { name: "Replica", of: (r) => (r.replica ? short(r.replica) : "–") },
    { name: "First token", kind: "figure", of: (r) => shortTime(r.first_token_seconds) },
    { name: "In all", kind: "figure", of: (r) => [shortTime(r.seconds), under(`${whole(r.output_tokens)} tokens`)] },
  ];
  fillTable(byId("ended"), endedColumns, ended.slice(0, 10), { nothing: "Nothing yet." });
}

/** A button that opens a request's story. */
function opener(id) {
  const brief = id.length > 16 ? `${id.slice(0, 12)}…` : id;
  return make("button", { type: "button", "data-id": id, title: id, onclick: () => showStory(id) }, brief);
}

/** The reason for which a request runs where it runs, in a sentence. */
function why(r) {
  if (r.expected_seconds === null) return "taken over: its reasons were not kept";
  const parts = [];
  if (r.waits_in_engine) parts.push("first of its account: it waits in the engine for its turn");
  parts.push(`done in ${shortTime(r.expected_seconds)}, as expected`);
  if (r.next_best) parts.push(`next best ${short(r.next_best)} in ${shortTime(r.next_best_seconds)}`);
  const out = Object.entries(r.kept_out).map(([id, state]) => `${short(id)} ${state}`);
  if (out.length) parts.push(out.join(", "));
  if (!r.next_best && !out.length) parts.push("the only replica");
  if (r.cached_tokens) parts.push(`${whole(r.cached_tokens)} of ${whole(r.prompt_tokens)} tokens cached`);
  if (r.resumed_tokens) parts.push(`resumed after ${whole(r.resumed_tokens)} tokens`);
  return parts.join("; ");
}

// --- the loop ---

function link(kind, text) {
  byId("link").className = `chip ${kind}`;
  byId("link").textContent = text;
  document.querySelector("main").classList.toggle("stale", kind === "bad");
}

function say(text) {
  byId("notice").hidden = !text;
  byId("notice").replaceChildren(make("p", {}, text));
}

async function look() {
  try {
    show(await callJson("/cluster"));
    say("");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    link("bad", "no answer");
    if (error.status === 401 || error.status === 403) {
      say(error.status === 401 ? "The server asks for an API key." : "This page is for admins: their keys say 'admin: true'.");
      locked = true;
      await enterKey();
    } else if (error.status === 404) {
      say("The server at this address is no Echelon, or has no dispatcher: there is nothing to show.");
    } else {
      say(`${error.message} The page goes on once it is back.`);
    }
    await pause(Math.max(error.retryAfter, 1));
  }
}

async function enterKey() {
  if (await askForKey("This page needs the key of an admin.")) locked = false;
}

byId("pause").onclick = () => {
  paused = !paused;
  byId("pause").textContent = paused ? "Go on" : "Pause";
  byId("pause").setAttribute("aria-pressed", String(paused));
  if (paused) link("quiet", "paused");
};
byId("key-button").onclick = enterKey;
for (const [kind, is] of [["pointerdown", true], ["pointerup", false], ["pointercancel", false]]) {
  document.addEventListener(kind, () => (pressed = is));
}
for (;;) {
  if (!paused && !locked && !pressed && !document.hidden) await look();
  await pause(LOOK_SECONDS);
}
