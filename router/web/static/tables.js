// Tables of the operator's page: rows of cells, filled anew at each look without losing the focus of a button.

import { make } from "./dom.js";

/**
 * Fill the table of `section`. `columns`: [{name, of, kind}]: `of` makes a cell's content (text, an element, or a list
 * of both) of a row; `kind` is "name", "figure", "long" or nothing. `nothing` is said where there are no rows.
 */
export function fillTable(section, columns, rows, { nothing, more = 0, rowClass = () => "" }) {
  const table = section.querySelector("table");
  const focused = table.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const head = make("tr", {}, ...columns.map(({ name, kind }) => make("th", { scope: "col", className: kind ?? "" }, name)));
  const body = rows.map((row) => make("tr", { className: rowClass(row) }, ...columns.map((column) => cell(column, row))));
  if (!rows.length) {
    table.replaceChildren(make("tbody", {}, make("tr", {}, make("td", { className: "nothing" }, nothing))));
  } else {
    table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
  }
  if (focused) table.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  section.querySelector(".more-rows")?.remove();
  if (more) section.append(make("p", { className: "more-rows" }, `and ${more.toLocaleString()} more`));
}

function cell({ name, kind, of }, row) {
  const content = of(row);
  return make("td", { className: kind ?? "", "data-label": name }, ...(Array.isArray(content) ? content : [content]));
}

/** A second, quieter line in a cell. */
export function under(text) {
  return text ? make("span", { className: "under" }, text) : null;
}

/** A share of 1 as a bar and in words; `share` null: nothing. */
export function meter(share) {
  if (share === null) return "–";
  const percent = `${Math.round(share * 100)}%`;
  const filled = make("i");
  filled.style.width = percent;
  const bar = make("span", { className: "meter", "aria-hidden": "true" }, filled);
  return make("span", { className: "amount" }, bar, percent.replace("%", " %"));
}
