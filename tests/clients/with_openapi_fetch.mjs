// openapi-typescript's types and openapi-fetch, from the server's own openapi.json; `tsc` checks the calls.
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [url, modules] = [process.argv[2], process.env.NODE_PATH];
const folder = fs.mkdtempSync(path.join(modules, "..", "generated-"));
const bin = (name) => path.join(modules, ".bin", name);

const calls = `import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

export async function run(baseUrl: string): Promise<string> {
  const client = createClient<paths>({ baseUrl });
  const chat = await client.POST("/v1/chat/completions", {
    body: { model: "demo", messages: [{ role: "user", content: "What is 3 + 4?" }], temperature: 0 },
  });
  if (chat.error) throw new Error(JSON.stringify(chat.error));
  const text: string = chat.data.choices[0].message.content ?? "";
  const ids = await client.POST("/tokenize", { body: { model: "demo", prompt: text } });
  if (ids.error) throw new Error(JSON.stringify(ids.error));
  const back = await client.POST("/detokenize", { body: { model: "demo", tokens: ids.data.tokens } });
  if (back.error || !back.data.prompt.endsWith(text)) throw new Error("there and back");
  const message = await client.POST("/v1/messages", {
    body: {
      model: "demo",
      messages: [{ role: "user", content: [{ type: "text", text: "What is 3 + 4?" }] }],
      max_tokens: 64,
      tools: [{ name: "add", input_schema: { type: "object", properties: { sure: { type: "boolean" } } } }],
      tool_choice: { type: "tool", name: "add" },
    },
  });
  if (message.error) throw new Error(message.error.error.message);
  const [block] = message.data.content;
  if (block.type !== "tool_use" || block.name !== "add") throw new Error("the call");
  const refused = await client.POST("/v1/completions", { body: { model: "nope", prompt: "x" } });
  if (refused.error?.error.code !== "model_not_found") throw new Error("the error");
  return text;
}
`;

try {
  const schema = await (await fetch(url + "/openapi.json")).text();
  fs.writeFileSync(path.join(folder, "openapi.json"), schema);
  execFileSync(bin("openapi-typescript"), ["openapi.json", "-o", "schema.d.ts"], { cwd: folder });
  fs.writeFileSync(path.join(folder, "calls.ts"), calls);
  const options = "--strict --skipLibCheck --target es2022 --module nodenext --moduleResolution nodenext".split(" ");
  fs.writeFileSync(path.join(folder, "package.json"), '{"type":"module"}');
  execFileSync(bin("tsc"), [...options, "calls.ts"], { cwd: folder, stdio: "inherit" });
  const { run } = await import(pathToFileURL(path.join(folder, "calls.js")));
  if (!(await run(url)).includes("7")) throw new Error("the answer");
} finally {
  fs.rmSync(folder, { recursive: true });
}
const version = JSON.parse(fs.readFileSync(path.join(modules, "openapi-typescript", "package.json"))).version;
const what = "types from openapi.json, strict tsc, chat, a call in messages, tokens there and back, an error";
console.log("TRIED " + JSON.stringify({ client: "openapi-typescript + openapi-fetch", version, what }));
