// What went wrong, for people: what it is, and what to do now.

import { shortTime } from "./dom.js";

/** {title, detail, action}: `action` is "key", "again", "new", "models" or "". */
export function explained(problem) {
  const said = problem.message;
  switch (problem.status) {
    case 0:
      return { title: "The server does not answer. Try again once it is back.", detail: "", action: "again" };
    case 401:
      return problem.code === "invalid_api_key"
        ? { title: "The server does not know this API key. Enter another one.", detail: said, action: "key" }
        : { title: "The server asks for an API key.", detail: said, action: "key" };
    case 403:
      return { title: "This API key may not do that. Enter one that may.", detail: said, action: "key" };
    case 404:
      return { title: "There is no such model any more. Choose another one.", detail: said, action: "models" };
    case 429:
      return { title: queueFull(problem), detail: said, action: "again" };
    case 502:
    case 503:
    case 504:
      return { title: "The server is not there, or has no replica. Try again in a while.", detail: said, action: "again" };
  }
  if (problem.code === "context_length_exceeded") {
    return { title: "The conversation is too long for this model. Begin a new one.", detail: said, action: "new" };
  }
  if (problem.status < 500) return { title: "The server refuses the request.", detail: said, action: "" };
  return { title: "The server failed.", detail: said, action: "again" };
}

function queueFull(problem) {
  const again = `Try again in ${shortTime(Math.max(problem.retryAfter, 1))}.`;
  if (!problem.position) return `The server has too much to do. ${again}`;
  const [least, , most] = problem.wait;
  const wait = most === undefined ? "" : `, and would have waited ${shortTime(least)} to ${shortTime(most)}`;
  return `The queue is full: you would have stood at place ${problem.position.toLocaleString()}${wait}. ${again}`;
}
