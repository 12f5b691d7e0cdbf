// One request's story, as GET /requests/ID/explain tells it.

import { Problem, callJson } from "./api.js";
import { byId, make, shortTime } from "./dom.js";
import { fillTable } from "./tables.js";

const STATES = {
  chosen: "chosen", possible: "possible, but later", full: "full", excluded: "excluded: it failed this request before",
  suspect: "suspect: no progress", draining: "draining",
};

/** Show it in the dialog. */
export async function showStory(id) {
  const dialog = byId("story");
  const close = make("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const actions = make("div", { className: "actions" }, close);
  dialog.replaceChildren(make("h2", { id: "story-title" }, `Request ${id}`), make("p", {}, "…"), actions);
  if (!dialog.open) dialog.showModal();
  let story;
  try {
    story = await callJson(`/requests/${encodeURI(id)}/explain`);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    dialog.replaceChildren(dialog.firstChild, make("p", {}, error.message), actions);
    return;
  }
  dialog.replaceChildren(dialog.firstChild, ...facts(story), ...story.leases.flatMap(lease), ...spans(story.seconds), actions);
}

function facts(story) {
  const who = [story.owner, story.user].filter(Boolean).join(" / ");
  const tier = story.tier ? `, tier ${story.tier}${story.account ? ` (account ${story.account})` : ""}` : "";
  const place = story.position ? `, place ${story.position} in the queue` : "";
  const state = story.outcome ? `ended: ${story.outcome}` : story.state;
  const tokens = story.output_tokens === null ? "" : `${story.prompt_tokens} tokens in, ${story.output_tokens} out, `;
  return [
    make("p", {}, `Of ${who}${tier}; ${state}${place}.`),
    make("p", { className: "muted" }, `${tokens}${story.units} units charged, ${story.preemptions} preemptions.`),
  ];
}

function lease(one, number) {
  const section = make("section", {}, make("h3", {}, number ? `Lease ${number + 1}` : "Why it runs where it runs"), make("table"));
  const columns = [
    { name: "Replica", kind: "name", of: (c) => c.replica },
    { name: "Was", of: (c) => STATES[c.state] ?? c.state },
    { name: "First token in", kind: "figure", of: (c) => shortTime(c.first_token_seconds) },
    { name: "Last token in", kind: "figure", of: (c) => shortTime(c.expected_seconds) },
    { name: "Cached", kind: "figure", of: (c) => `${c.cached_tokens} tokens` },
  ];
  fillTable(section, columns, one.candidates, { nothing: "It has no replica yet." });
  const places = one.positions.map((p) => `place ${p.position} after ${shortTime(p.after_seconds)}`);
  if (places.length) section.append(make("p", { className: "muted" }, `It waited: ${places.join(", ")}.`));
  return [section];
}

function spans(seconds) {
  if (!seconds || !seconds.total) return [];
  const parts = Object.entries(seconds).filter(([name]) => name !== "total");
  const bar = make("div", { className: "spans", "aria-hidden": "true" });
  const key = make("div", { className: "key" });
  parts.forEach(([name, part], at) => {
    const piece = make("i", { className: `series-${at + 1}` });
    piece.style.width = `${(part / seconds.total) * 100}%`;
    bar.append(piece);
    key.append(make("span", { className: `series-${at + 1}` }, `${name.replace("_", " ")} ${shortTime(part)}`));
  });
  return [make("h3", {}, `Where its ${shortTime(seconds.total)} went`), bar, key];
}
