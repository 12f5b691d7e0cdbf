// The openai package for Node.
const fs = require("node:fs");
const path = require("node:path");
const OpenAI = require("openai");

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const chat = { model: "demo", messages: [{ role: "user", content: "What is 3 + 4?" }], temperature: 0 };

function check(good, what) {
  if (!good) throw new Error(what);
}

async function main() {
  const whole = await client.chat.completions.create(chat);
  const text = whole.choices[0].message.content;
  check(text.includes("7"), "the answer");
  let streamed = "";
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...chat, ...options }))
    for (const choice of chunk.choices) streamed += choice.delta.content ?? "";
  check(streamed === text, "the stream");
  const final = await client.chat.completions.stream(chat).finalChatCompletion();
  check(final.choices[0].message.content === text, "the accumulator");
  const many = await client.completions.create({ model: "demo", prompt: "3 + 4", max_tokens: 5, n: 2 });
  check(many.choices.length === 2, "two choices");
  const answer = await client.responses.create({ model: "demo", input: "What is 3 + 4?", temperature: 0, store: false });
  check(answer.output_text === text, "the response");
  let said = "";
  const asked = { model: "demo", input: "What is 3 + 4?", temperature: 0, store: false, stream: true };
  for await (const event of await client.responses.create(asked))
    if (event.type === "response.output_text.delta") said += event.delta;
  check(said === text, "the streamed response");
  const parameters = {
    type: "object",
    properties: { sure: { type: "boolean" } },
    required: ["sure"],
    additionalProperties: false,
  };
  const tools = [{ type: "function", name: "add", parameters, strict: true }];
  const calls = { ...asked, tools, tool_choice: { type: "function", name: "add" }, stream: false };
  const [call] = (await client.responses.create(calls)).output;
  check(call.type === "function_call" && typeof JSON.parse(call.arguments).sure === "boolean", "the call");
  const streamedCall = await client.responses.stream({ ...calls, stream: true }).finalResponse();
  check(streamedCall.output[0].arguments === call.arguments, "the streamed call");
  const format = { type: "json_schema", name: "answer", schema: parameters, strict: true };
  const fixed = await client.responses.parse({ ...asked, stream: false, text: { format } });
  check(typeof fixed.output_parsed.sure === "boolean", "the format");
  const refused = await client.chat.completions.create({ ...chat, temperature: 3 }).catch((e) => e);
  check(refused instanceof OpenAI.BadRequestError && refused.param === "temperature", "the error");
  const folder = path.dirname(require.resolve("openai"));
  const { version } = JSON.parse(fs.readFileSync(path.join(folder, "package.json")));
  const what = "chat, streams and their accumulator, completions, responses, streamed and not, with functions and a format, errors";
  console.log("TRIED " + JSON.stringify({ client: "openai-node", version, what }));
}

main().catch((e) => {
  console.error(e);
  process.exit(1);
});
