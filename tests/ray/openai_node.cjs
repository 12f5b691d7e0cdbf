// The openai package for Node, unmodified, against the server at argv[2]. Prints one line of JSON: what it saw.
const OpenAI = require("openai");

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Count from 3 to 12." }];
const chat = { model: "demo", messages, temperature: 0 };

async function refusal(body) {
  try {
    await client.chat.completions.create(body);
    return null;
  } catch (e) {
    return { class: e.constructor.name, status: e.status, code: e.code, param: e.param, type: e.type, id: !!e.requestID };
  }
}

async function main() {
  const seen = {};
  seen.models = [];
  for await (const model of client.models.list()) seen.models.push(model.id);

  const whole = await client.chat.completions.create(chat);
  seen.text = whole.choices[0].message.content;
  seen.finish = whole.choices[0].finish_reason;
  seen.usage = whole.usage.completion_tokens;

  seen.streamed = "";
  seen.streamedFinish = [];
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...chat, ...options })) {
    if (chunk.usage) seen.streamedUsage = chunk.usage.completion_tokens;
    for (const choice of chunk.choices) {
      seen.streamed += choice.delta.content ?? "";
      if (choice.finish_reason) seen.streamedFinish.push(choice.finish_reason);
    }
  }
  const final = await client.chat.completions.stream(chat).finalChatCompletion(); // the package's own accumulator
  seen.accumulated = final.choices[0].message.content;

  const completion = await client.completions.create({ model: "demo", prompt: "3 + 4", max_tokens: 5, n: 2 });
  seen.completions = completion.choices.map((c) => c.index);

  const many = Array.from({ length: 16 }, () => client.chat.completions.create(chat));
  seen.atOnce = (await Promise.all(many)).filter((a) => a.choices[0].message.content === seen.text).length;

  const long = await client.chat.completions.create({ ...chat, max_tokens: 1500, ignore_eos: true, stream: true });
  let chunks = 0;
  for await (const _ of long) if (++chunks === 5) break; // the package aborts the request
  seen.left = chunks;

  seen.badRequest = await refusal({ ...chat, temperature: 3 });
  seen.badStream = await refusal({ ...chat, temperature: 3, stream: true });
  seen.notFound = await refusal({ ...chat, model: "nope" });
  console.log(JSON.stringify(seen));
}

main().catch((e) => {
  console.error(e);
  process.exit(1);
});
