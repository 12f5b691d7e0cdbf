// One answer, streamed. It outlives a connection, or a server, that goes away: the same seed gives the same words, so that
// it is asked for again once the server is back, and goes on where it was.

import { Problem, call, callJson, events, pause, requestId } from "./api.js";

const MOST_TRIES = 6;
const AWAY_SECONDS = 180; // how long a server may be away
const LOOK_SECONDS = 1; // between two looks at the place in the queue, or at a server that is away

/**
 * Ask for an answer to `body`, a chat completion's. `show` is called with what is known whenever that changes: {text,
 * thoughts, state}; `state` says what is waited for, in words, if anything is. Resolves to {text, thoughts, finish,
 * model, usage, firstSeconds, seconds, stopped, tries, id}. Throws Problem; its `partial` is what had come until then.
 */
export async function ask(body, { signal, show }) {
  const began = performance.now();
  const answer = { text: "", thoughts: "", finish: null, usage: null, firstSeconds: null, stopped: false, tries: 0, id: "" };
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const elapsed = () => (performance.now() - began) / 1000;
  for (;;) {
    answer.tries++;
    answer.id = requestId();
    try {
      await stream(whole, answer, elapsed, signal, show);
      break;
    } catch (error) {
      if (signal.aborted) {
        answer.stopped = true;
        break;
      }
      if (!(error instanceof Problem)) throw error;
      if (!error.passes || answer.tries >= MOST_TRIES) throw Object.assign(error, { partial: answer });
      show({ ...answer, state: "The server went away. The answer goes on once it is back …" });
      try {
        await untilBack(error, signal);
      } catch (reason) {
        if (!signal.aborted) throw Object.assign(reason, { partial: answer });
        answer.stopped = true;
        break;
      }
    }
  }
  answer.seconds = elapsed();
  return answer;
}

async function stream(body, answer, elapsed, signal, show) {
  const waiting = new AbortController();
  const stopWatching = () => waiting.abort();
  signal.addEventListener("abort", stopWatching, { once: true });
  watchQueue(answer, waiting.signal, show);
  let text = "";
  let thoughts = "";
  try {
    const response = await call("/v1/chat/completions", { method: "POST", body, signal, id: answer.id });
    for await (const event of events(response)) {
      answer.usage = event.usage ?? answer.usage;
      answer.model = event.model ?? answer.model;
      const choice = event.choices?.[0];
      if (!choice) continue;
      answer.finish = choice.finish_reason ?? answer.finish;
      text += choice.delta?.content ?? "";
      thoughts += choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
      if (!text && !thoughts) continue;
      stopWatching();
      answer.firstSeconds ??= elapsed();
      // After a resumption nothing is shown twice, or taken back, while it catches up with what was there.
      if (!answer.text.startsWith(text)) answer.text = text;
      if (!answer.thoughts.startsWith(thoughts)) answer.thoughts = thoughts;
      show({ ...answer, state: "" });
    }
    answer.text = text;
    answer.thoughts = thoughts;
  } finally {
    stopWatching();
  }
}

/** While nothing has come: the request's place in the queue, and how long that will probably take. */
async function watchQueue(answer, signal, show) {
  show({ ...answer, state: answer.text ? "The answer goes on …" : "Waiting for the first word …" });
  try {
    for (;;) {
      await pause(LOOK_SECONDS, signal);
      const request = await callJson(`/requests/${answer.id}`, { signal });
      if (request.state !== "waiting" || !request.position) continue;
      const [least, , most] = request.wait_seconds ?? [];
      const long = most === undefined ? "" : `, about ${Math.round(least)} to ${Math.ceil(most)} s`;
      const tier = request.tier ? ` of tier ${request.tier}` : "";
      show({ ...answer, state: `In the queue${tier}: place ${request.position}${long}` });
    }
  } catch {
    // The answer has begun, or this server does not tell: then nothing more is said of the queue.
  }
}

/** Wait until the server answers again. Throws `problem` when that takes too long. */
async function untilBack(problem, signal) {
  const until = performance.now() + AWAY_SECONDS * 1000;
  await pause(Math.max(problem.retryAfter, 0.3), signal);
  for (;;) {
    try {
      await call("/health", { signal });
      return;
    } catch (error) {
      if (signal.aborted || performance.now() > until) throw problem;
      if (!error.passes) return; // it answers, if only that there is no such route
    }
    await pause(LOOK_SECONDS, signal);
  }
}
