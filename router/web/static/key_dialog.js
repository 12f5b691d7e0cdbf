// Where the API key is typed in, on both pages.

import { key } from "./api.js";
import { make } from "./dom.js";

let dialog;

/** Ask for the key; `reason` says why. Resolves to whether it was changed. */
export function askForKey(reason = "") {
  dialog ??= document.body.appendChild(make("dialog", { id: "key-dialog", "aria-labelledby": "key-title" }));
  const input = make("input", {
    id: "key-input", type: "password", autocomplete: "off", spellcheck: false, placeholder: "ek-…", value: key.get(),
  });
  const done = (value) => {
    key.set(value.trim());
    dialog.close("changed");
  };
  const form = make(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        done(input.value);
      },
    },
    make("h2", { id: "key-title" }, "API key"),
    make("p", { className: "muted" }, reason || "Requests are made in the name of the key's owner."),
    make("label", { className: "field" }, make("span", {}, "Key"), input),
    make("p", { className: "muted" }, "It is kept in this tab only, and forgotten when the tab is closed."),
    make(
      "div",
      { className: "actions" },
      key.get() ? make("button", { type: "button", onclick: () => done("") }, "Forget it") : null,
      make("button", { type: "button", onclick: () => dialog.close("") }, "Cancel"),
      make("button", { type: "submit", className: "primary", id: "key-save" }, "Use this key"),
    ),
  );
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "changed"), { once: true });
  });
}
