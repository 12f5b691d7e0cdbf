// From totals since a replica's start to rates: what changed between two looks at the dispatcher's table.

/** {tokens, steps}: of each replica by id, per second; null until there are two looks, or after a restart. */
export class Rates {
  #last = new Map(); // by id: {at, tokens, steps}

  /** `at`: seconds, when the table was made. */
  look(at, replicas) {
    const found = new Map();
    const next = new Map();
    for (const { id, executed_tokens: tokens, steps } of replicas) {
      const before = this.#last.get(id);
      if (before && at - before.at < 0.4) {
        found.set(id, before.rate); // the same table again
        next.set(id, before);
        continue;
      }
      const seconds = before ? at - before.at : 0;
      const known = before && tokens >= before.tokens && steps >= before.steps;
      const rate = known ? { tokens: (tokens - before.tokens) / seconds, steps: (steps - before.steps) / seconds } : null;
      found.set(id, rate);
      next.set(id, { at, tokens, steps, rate });
    }
    this.#last = next;
    return found;
  }
}

/** The middle one of `values`; null where there are none. */
export function median(values) {
  const sorted = values.filter((v) => v !== null && v !== undefined).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : null;
}
