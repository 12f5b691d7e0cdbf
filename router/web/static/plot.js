// Lines over the last minutes, drawn as SVG; colours come from the style sheet.

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 560;
const HEIGHT = 150;
const LEFT = 46;
const BOTTOM = 20;
const TOP = 8;
const LEAST = 60; // seconds that are shown at first,
const MOST = 300; // and at last

function draw(tag, values = {}, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The least "round" number that is at least `value`: 1, 2, 5, 10, 20, ... */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((digit) => digit * power).find((round) => round >= value * 0.999);
}

/** A figure with a title, the present values as its legend, and one line for each series. */
export class Plot {
  #series = new Map(); // by name: {points: [[seconds, value]], line, entry}
  #grid = draw("g", { class: "grid" });
  #lines = draw("g", { class: "lines" });
  #cursor = draw("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  #legend = document.createElement("div");
  #pointed = null; // seconds ago, where the pointer is
  #now = 0;
  #began = null;

  /** `format` turns a value into words; `least` is the smallest top of the scale; `dots`: values apart, no lines. */
  constructor(figure, title, { format, least = 1, most = Infinity, dots = false }) {
    Object.assign(this, { format, least, most, dots });
    const caption = document.createElement("figcaption");
    caption.append(title);
    this.#legend.className = "legend number";
    this.svg = draw(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title, preserveAspectRatio: "none" },
      this.#grid,
      this.#lines,
      this.#cursor,
    );
    this.title = title;
    figure.append(caption, this.#legend, this.svg);
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      this.#pointed = Math.min(Math.max((WIDTH - x) / (WIDTH - LEFT), 0), 1) * this.span;
      this.draw();
    });
    this.svg.addEventListener("pointerleave", () => {
      this.#pointed = null;
      this.draw();
    });
  }

  /** `values` by series at `now`, in seconds; a series that is not named gets a gap. */
  add(now, values) {
    this.#now = now;
    this.#began ??= now;
    for (const name of Object.keys(values)) this.#find(name);
    for (const [name, series] of this.#series) {
      const given = values[name];
      for (const value of Array.isArray(given) ? given : [given ?? null]) series.points.push([now, value]);
      while (series.points.length && series.points[0][0] < now - MOST) series.points.shift();
      if (!(name in values) && series.points.every(([, value]) => value === null)) this.#drop(name);
    }
    this.draw();
  }

  /** Seconds that are shown. */
  get span() {
    return Math.min(Math.max(this.#now - (this.#began ?? this.#now), LEAST), MOST);
  }

  #find(name) {
    let series = this.#series.get(name);
    if (!series) {
      const taken = new Set([...this.#series.values()].map((s) => s.colour));
      const colour = [1, 2, 3, 4, 5, 6].find((number) => !taken.has(number)) ?? 1;
      const line = draw("path", { class: `series-${colour}${this.dots ? " dots" : ""}` });
      const entry = document.createElement("span");
      entry.className = `series-${colour}`;
      series = { colour, line, entry, points: [] };
      this.#series.set(name, series);
      this.#lines.append(line);
      this.#legend.append(entry);
    }
    return series;
  }

  #drop(name) {
    const { line, entry } = this.#series.get(name);
    line.remove();
    entry.remove();
    this.#series.delete(name);
  }

  draw() {
    const values = [...this.#series.values()].flatMap((s) => s.points.map((p) => p[1])).filter((v) => v !== null);
    const top = Math.min(roundUp(Math.max(this.least, ...values)), this.most);
    const span = this.span;
    const x = (at) => WIDTH - ((this.#now - at) / span) * (WIDTH - LEFT);
    const y = (value) => HEIGHT - BOTTOM - (Math.min(value, top) / top) * (HEIGHT - BOTTOM - TOP);
    this.#drawGrid(top, y);
    for (const [name, { points, line, entry }] of this.#series) {
      line.setAttribute("d", this.dots ? dotted(points, x, y) : lined(points, x, y));
      const at = this.#pointed === null ? points.findLast((p) => p[1] !== null) : nearest(points, this.#now - this.#pointed);
      entry.textContent = `${name} ${at ? this.format(at[1]) : "–"}`;
    }
    this.#cursor.setAttribute("visibility", this.#pointed === null ? "hidden" : "visible");
    const place = x(this.#now - (this.#pointed ?? 0));
    this.#cursor.setAttribute("x1", place);
    this.#cursor.setAttribute("x2", place);
    this.svg.setAttribute("aria-label", `${this.title}: ${this.#legend.textContent || "nothing yet"}`);
  }

  #drawGrid(top, y) {
    const label = (values, text) => draw("text", values, text);
    const rows = [0, top / 2, top].flatMap((value) => [
      draw("line", { x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }),
      label({ x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, this.format(value)),
    ]);
    const foot = { y: HEIGHT - 4 };
    const columns = [
      label({ ...foot, x: LEFT }, `${this.span < 120 ? `${Math.round(this.span)} s` : `${Math.round(this.span / 60)} min`} ago`),
      label({ ...foot, x: WIDTH, "text-anchor": "end" }, "now"),
    ];
    this.#grid.replaceChildren(...rows, ...columns);
  }
}

function lined(points, x, y) {
  let path = "";
  let pen = "M";
  for (const [at, value] of points) {
    if (value !== null) path += `${pen}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value === null ? "M" : "L";
  }
  return path;
}

function dotted(points, x, y) {
  return points.filter((p) => p[1] !== null).map(([at, v]) => `M${x(at).toFixed(1)} ${y(v).toFixed(1)}h0`).join("");
}

function nearest(points, at) {
  const known = points.filter((p) => p[1] !== null && Math.abs(p[0] - at) < 5);
  return known.sort((a, b) => Math.abs(a[0] - at) - Math.abs(b[0] - at))[0];
}
