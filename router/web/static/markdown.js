// Markdown as models write it, into elements. Whatever is not known stays text: tags, scripts, styles, pictures.
//
// What is nested, or searched for the end of a mark, is bounded, so that no text takes long.

import { make } from "./dom.js";

const DEEPEST = 6;
const INLINE = new RegExp(
  [
    "(?<ticks>`{1,3})(?!`)(?<code>.{1,2000}?)(?<!`)\\k<ticks>(?!`)",
    "!?\\[(?<label>[^\\]\\n]{1,400})\\]\\((?<url>[^)\\s]{1,2000})\\)",
    "(?<two>\\*\\*|__)(?=\\S)(?<strong>.{1,600}?)(?<=\\S)\\k<two>",
    "(?<!\\w)(?<one>[*_])(?=[^\\s*_])(?<em>.{1,400}?)(?<=\\S)\\k<one>(?!\\w)",
    "~~(?=\\S)(?<gone>.{1,400}?)~~",
    "(?<link>https?://[^\\s<>\"'`)\\]]{1,2000})",
    "\\\\(?<plain>[\\\\`*_{}\\[\\]()#+.!>~|-])",
  ].join("|"),
  "gs",
);
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,30})/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Shows a text that grows: blocks that have not changed stay as they are. */
export class Rendered {
  #blocks = [];

  constructor(element) {
    this.element = element;
  }

  update(text) {
    const blocks = split(text.split("\n"));
    let same = 0;
    while (same < blocks.length && same < this.#blocks.length && alike(blocks[same], this.#blocks[same])) same++;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    this.element.append(...blocks.slice(same).map((block) => build(block, 0)));
    this.#blocks = blocks;
  }
}

function alike(one, other) {
  return one.kind === other.kind && one.lines.length === other.lines.length && one.lines.every((l, i) => l === other.lines[i]);
}

/** Blocks of lines: {kind, lines}. */
function split(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    let end = at + 1;
    if (!line.trim()) {
      at++;
      continue;
    } else if (fence) {
      const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      while (end < lines.length && !closing.test(lines[end])) end++;
      blocks.push({ kind: "code", language: fence[2], lines: lines.slice(at + 1, end) });
      at = end + 1;
      continue;
    } else if (HEADING.test(line)) {
      blocks.push({ kind: "heading", lines: [line] });
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule", lines: [line] });
    } else if (/^\s{0,3}>/.test(line)) {
      while (end < lines.length && /^\s{0,3}>/.test(lines[end])) end++;
      blocks.push({ kind: "quote", lines: lines.slice(at, end) });
    } else if (ITEM.test(line)) {
      while (end < lines.length && belongsToList(lines, end)) end++;
      blocks.push({ kind: "list", lines: lines.slice(at, end) });
    } else if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      while (end < lines.length && lines[end].includes("|")) end++;
      blocks.push({ kind: "table", lines: lines.slice(at, end) });
    } else {
      while (end < lines.length && !startsBlock(lines[end])) end++;
      blocks.push({ kind: "text", lines: lines.slice(at, end) });
    }
    at = end;
  }
  return blocks;
}

function startsBlock(line) {
  return !line.trim() || [FENCE, HEADING, RULE, ITEM].some((mark) => mark.test(line)) || /^\s{0,3}>/.test(line);
}

function belongsToList(lines, at) {
  const line = lines[at];
  if (!line.trim()) return /^\s{2,}\S/.test(lines[at + 1] ?? "") || ITEM.test(lines[at + 1] ?? "");
  return ITEM.test(line) || /^\s{2,}/.test(line) || !startsBlock(line);
}

function build(block, depth) {
  const { kind, lines } = block;
  if (depth > DEEPEST) return make("p", {}, lines.join("\n"));
  if (kind === "code") return code(block);
  if (kind === "rule") return make("hr");
  if (kind === "quote") return fill(make("blockquote"), lines.map((l) => l.replace(/^\s{0,3}> ?/, "")), depth);
  if (kind === "list") return list(lines, depth);
  if (kind === "table") return table(lines);
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return make(`h${Math.min(marks.length + 2, 6)}`, {}, ...inline(text, 0));
  }
  return make("p", {}, ...inline(lines.map((line) => line.trim()).join("\n"), 0));
}

function fill(element, lines, depth) {
  element.append(...split(lines).map((block) => build(block, depth + 1)));
  return element;
}

function code({ language, lines }) {
  const text = lines.join("\n");
  const copy = make("button", { type: "button", className: "plain copy" }, "Copy");
  copy.onclick = () => copyText(text, copy);
  const head = make("div", { className: "code-head" }, make("span", {}, language || "text"), copy);
  return make("div", { className: "code" }, head, make("pre", { tabIndex: 0 }, make("code", {}, text)));
}

/** Puts `text` into the clipboard; `button` says that it did. */
export async function copyText(text, button) {
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // no clipboard without HTTPS, but on this machine
  }
  setTimeout(() => (button.textContent = said), 1500);
}

function list(lines, depth) {
  const [, lead, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const element = make(ordered ? "ol" : "ul");
  if (ordered) element.start = parseInt(mark, 10);
  let item = [];
  const close = () => {
    if (item.length) element.append(fill(make("li"), item, depth));
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= lead.length + 1) {
      close();
      item = [found[3]];
    } else {
      item.push(line.replace(new RegExp(`^\\s{0,${lead.length + mark.length + 1}}`), ""));
    }
  }
  close();
  return element;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (kind) => (line) => make("tr", {}, ...cells(line).map((cell) => make(kind, {}, ...inline(cell, 0))));
  const body = make("tbody", {}, ...lines.slice(2).map(row("td")));
  return make("div", { className: "wide" }, make("table", {}, make("thead", {}, row("th")(lines[0])), body));
}

/** Nodes of a line of text. */
function inline(text, depth) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > at) nodes.push(text.slice(at, found.index));
    nodes.push(marked(found, depth + 1));
    at = found.index + found[0].length;
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function marked(found, depth) {
  const { code, label, url, strong, em, gone, link, plain } = found.groups;
  if (code !== undefined) return make("code", {}, code);
  if (strong !== undefined) return make("strong", {}, ...inline(strong, depth));
  if (em !== undefined) return make("em", {}, ...inline(em, depth));
  if (gone !== undefined) return make("s", {}, ...inline(gone, depth));
  if (plain !== undefined) return plain;
  if (link !== undefined) return anchor(link, [link]) ?? link;
  return anchor(url, inline(label, depth)) ?? found[0];
}

/** A link to another site; null for an address that is none, such as one that holds a script. */
function anchor(url, content) {
  if (!/^(https?:\/\/|mailto:)/i.test(url) || !URL.canParse(url)) return null;
  return make("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...content);
}
