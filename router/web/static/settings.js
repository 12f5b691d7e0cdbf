// The parameters of requests, as typed in. They are kept for this tab.

import { byId } from "./dom.js";

const STORE = "echelon.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** Show what was kept, and keep what is changed. */
export function startSettings() {
  const panel = byId("settings");
  const button = byId("settings-button");
  const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
  const fields = ["system", ...NUMBERS].map(byId);
  for (const field of fields) field.value = kept[field.id] ?? "";
  panel.addEventListener("input", () => {
    sessionStorage.setItem(STORE, JSON.stringify(Object.fromEntries(fields.map((f) => [f.id, f.value]))));
  });
  button.onclick = () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-expanded", String(!panel.hidden));
    if (!panel.hidden) byId("system").focus();
  };
  byId("reset-settings").onclick = () => {
    for (const field of fields) field.value = "";
    sessionStorage.removeItem(STORE);
  };
}

/** The system prompt, if there is one. */
export function systemPrompt() {
  return byId("system").value.trim();
}

/** The parameters that were given; a field that holds no valid number is shown, and null returned. */
export function parameters() {
  const found = {};
  for (const name of NUMBERS) {
    const field = byId(name);
    if (!field.checkValidity()) {
      byId("settings").hidden = false;
      byId("settings-button").setAttribute("aria-expanded", "true");
      field.reportValidity();
      return null;
    }
    if (field.value !== "") found[name] = Number(field.value);
  }
  return found;
}
