// Calls to the server that showed this page. The API key is kept for this tab alone, in sessionStorage.

const KEY = "echelon.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server said in the place of an answer. `status` 0: it said nothing. */
export class Problem extends Error {
  constructor(status, error, headers = new Headers()) {
    super(error?.message || (status ? `The server answered ${status}.` : "The server does not answer."));
    this.status = status;
    this.code = error?.code ?? "";
    this.retryAfter = Number(headers.get("retry-after")) || 0; // seconds
    this.position = Number(headers.get("x-queue-position")) || 0;
    this.wait = (headers.get("x-queue-wait-seconds") ?? "").split(" ").filter(Boolean).map(Number);
  }

  static async of(response) {
    const body = await response.json().catch(() => null);
    return new Problem(response.status, body?.error, response.headers);
  }

  /** Whether the same request may go well once the server, or a replica of it, is back. */
  get passes() {
    return this.status === 0 || [502, 503, 504].includes(this.status);
  }
}

/** The answer to `method path`, if it is a good one. Throws Problem, or AbortError once `signal` is aborted. */
export async function call(path, { method = "GET", body, signal, id } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  if (id) headers["x-request-id"] = id;
  let response;
  try {
    const init = { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit" };
    response = await fetch(path, init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0);
  }
  if (!response.ok) throw await Problem.of(response);
  return response;
}

/** The same, as JSON. */
export async function callJson(path, options) {
  const response = await call(path, options);
  return response.json();
}

/** The events of a stream of server-sent JSON, up to [DONE]. Throws Problem where it breaks off before, or says so. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Problem(0);
      });
      if (done) throw new Problem(0);
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Problem(event.error.type === "service_unavailable_error" ? 503 : 500, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has ended already
  }
}

/** A fresh id for a request, short enough to be known by all of it. */
export function requestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(10));
  return `web-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}
