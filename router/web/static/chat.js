// The chat page: the conversation, and what is around it.

import { ask } from "./answer.js";
import { Problem, callJson, key } from "./api.js";
import { byId, counted, make, shortTime } from "./dom.js";
import { askForKey } from "./key_dialog.js";
import { Rendered, copyText } from "./markdown.js";
import { explained } from "./problems.js";
import { parameters, startSettings, systemPrompt } from "./settings.js";

const STORE = "echelon.chat";
const EXAMPLES = ["What is 17 + 25?", "What is the capital of France?", "Who are you?"];
const NEAR = 80; // pixels from the end: whoever is there sees the answer grow

const transcript = byId("transcript");
const prompt = byId("prompt");
const models = byId("model");

let conversation = load(); // {role, content, and of answers: thoughts, model, facts}
let views = []; // an element for each of them
let running = null; // the AbortController of the answer that comes now
let standing = {}; // by model: the caller's tier, as /me tells

// --- the conversation ---

function load() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? [];
  } catch {
    return [];
  }
}

function save() {
  sessionStorage.setItem(STORE, JSON.stringify(conversation));
}

function draw() {
  views = conversation.map(view);
  byId("messages").replaceChildren(...views.map((v) => v.element));
  update();
  toEnd();
}

function update() {
  byId("empty").hidden = conversation.length > 0;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("new-chat").disabled = conversation.length === 0;
  views.forEach((v, at) => {
    const last = at === views.length - 1;
    v.place?.({ last, grows: last && running !== null });
  });
}

function view(message) {
  if (message.role === "user") {
    return { element: make("article", { className: "message user" }, make("div", { className: "text" }, message.content)) };
  }
  const who = make("div", { className: "who" }, message.model ?? "");
  const thoughts = make("div");
  const box = make("details", { className: "thoughts", hidden: true }, make("summary", {}, "Reasoning"), thoughts);
  const text = make("div", { className: "text" });
  const state = make("div", { className: "state", hidden: true });
  const facts = make("span", { className: "facts number" });
  const copy = make("button", { type: "button", className: "plain" }, "Copy");
  copy.onclick = () => copyText(message.content, copy);
  const again = make("button", { type: "button", className: "plain regenerate", onclick: regenerate }, "Regenerate");
  const foot = make("div", { className: "foot" }, facts, copy, again);
  const element = make("article", { className: "message assistant" }, who, box, text, state, foot);
  const rendered = new Rendered(text);
  const shown = {
    element,
    show({ text: now, thoughts: thought, state: said }) {
      box.hidden = !thought;
      thoughts.textContent = thought ?? "";
      rendered.update(now);
      state.hidden = !said;
      state.textContent = said ?? "";
    },
    settle() {
      this.show({ text: message.content, thoughts: message.thoughts });
      who.textContent = message.model ?? "";
      facts.textContent = message.facts ?? "";
      facts.title = message.id ? `request ${message.id}` : "";
      copy.hidden = !message.content;
    },
    place({ last, grows }) {
      again.hidden = !last;
      foot.hidden = grows;
    },
  };
  shown.settle();
  return shown;
}

function atEnd() {
  return transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < NEAR;
}

function toEnd() {
  transcript.scrollTop = transcript.scrollHeight;
}

// --- asking ---

function send() {
  const text = prompt.value.trim();
  if (!text || running || !models.value) return;
  if (parameters() === null) return;
  conversation.push({ role: "user", content: text });
  prompt.value = "";
  grow();
  answerLast();
}

function regenerate() {
  if (running || parameters() === null) return;
  if (conversation.at(-1)?.role === "assistant") conversation.pop();
  if (conversation.length) answerLast();
}

async function answerLast() {
  hideNotice();
  const system = systemPrompt();
  const messages = conversation.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const body = { model: models.value, messages, seed, ...parameters() };
  const message = { role: "assistant", content: "", model: models.value };
  save();
  conversation.push(message);
  running = new AbortController();
  draw();
  const shown = views.at(-1);
  const show = inFrames((now) => {
    const follow = atEnd();
    shown.show(now);
    if (follow) toEnd();
  });
  let came;
  try {
    came = await ask(body, { signal: running.signal, show });
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    came = error.partial;
    showProblem(error);
  } finally {
    show.stop();
    running = null;
    finish(message, came);
  }
}

/** What is left of an answer that has ended, in whatever way; one without a word is taken back. */
function finish(message, came) {
  if (conversation.at(-1) !== message) return; // a new conversation was begun
  if (came?.text || came?.thoughts) {
    Object.assign(message, { content: came.text, thoughts: came.thoughts, facts: factsOf(came), id: came.id });
  } else if (came?.stopped || !came || !came.finish) {
    conversation.pop();
  } else {
    message.facts = "The model said nothing.";
  }
  save();
  const follow = atEnd();
  draw();
  if (!follow) return;
  toEnd();
  prompt.focus({ preventScroll: true });
}

function factsOf({ usage, firstSeconds, seconds, finish: reason, stopped, tries }) {
  const facts = [];
  if (stopped) facts.push("stopped");
  if (reason === "length") facts.push("cut off: its most tokens, or the end of the context");
  if (usage) facts.push(counted(usage.completion_tokens, "token"));
  if (firstSeconds !== null) facts.push(`first word after ${shortTime(firstSeconds)}`);
  if (usage && seconds > firstSeconds) {
    facts.push(`${((usage.completion_tokens - 1) / (seconds - firstSeconds)).toFixed(0)} tokens/s`);
  }
  if (tries > 1) facts.push("resumed");
  return facts.join(" · ");
}

/** `f`, called with the last value, at most once a frame. */
function inFrames(f) {
  let last = null;
  let asked = 0;
  const call = (value) => {
    last = value;
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      f(last);
    });
  };
  call.stop = () => cancelAnimationFrame(asked);
  return call;
}

// --- what is around it ---

function showProblem(problem) {
  const { title, detail, action } = explained(problem);
  const buttons = {
    key: ["Enter a key", () => enterKey(title)],
    again: ["Try again", conversation.length ? regenerate : start],
    new: ["New chat", newChat],
    models: ["Look again", start],
  };
  const [label, onclick] = buttons[action] ?? [];
  const text = make("p", {}, title, detail && detail !== title ? make("small", {}, detail) : null);
  const close = make("button", { type: "button", onclick: hideNotice, "aria-label": "Close" }, "×");
  const button = label ? make("button", { type: "button", id: "notice-action", onclick }, label) : null;
  const notice = byId("notice");
  notice.className = problem.status === 429 ? "notice" : "notice bad";
  notice.replaceChildren(...[text, button, close].filter(Boolean));
  notice.hidden = false;
}

function hideNotice() {
  byId("notice").hidden = true;
}

async function enterKey(reason) {
  if (!(await askForKey(reason))) return;
  hideNotice();
  if (!(await start())) return;
  if (conversation.at(-1)?.role === "user" && !running) answerLast();
}

function newChat() {
  running?.abort();
  conversation = [];
  save();
  hideNotice();
  draw();
  prompt.focus();
}

/** Learn which models there are, and who we are. False, with a notice, where the server does not tell. */
async function start() {
  let found;
  try {
    found = await callJson("/v1/models");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    showProblem(error);
    return false;
  }
  hideNotice();
  const before = models.value;
  const names = found.data.map((card) => card.id);
  models.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  models.disabled = names.length === 0;
  if (names.includes(before)) models.value = before;
  const who = await callJson("/me").catch(() => null); // another's server may not tell
  standing = who?.models ?? {};
  byId("operator-link").hidden = !who?.admin;
  byId("key-button").textContent = key.get() && who ? `Key: ${who.owner}` : "API key";
  showTier();
  return true;
}

function showTier() {
  const tier = standing[models.value]?.tier;
  byId("tier").hidden = !tier;
  byId("tier").textContent = tier ? `Tier ${tier}` : "";
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

startSettings();
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").onclick = () => running?.abort();
byId("new-chat").onclick = newChat;
byId("key-button").onclick = () => enterKey("");
models.onchange = showTier;
byId("examples").append(
  ...EXAMPLES.map((text) => {
    const onclick = () => {
      prompt.value = text;
      send();
    };
    return make("button", { type: "button", onclick }, text);
  }),
);
draw();
start();
