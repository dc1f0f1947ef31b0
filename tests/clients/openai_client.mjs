// The openai package of npm: models, chat, completions, responses, streams, log-probabilities, error classes.
import assert from 'node:assert/strict';
import OpenAI from 'openai';

const options = { baseURL: process.env.BASE + '/v1', apiKey: process.env.API_KEY, maxRetries: 0, timeout: 30000 };
const client = new OpenAI(options);
const ask = { model: 'arith', messages: [{ role: 'user', content: '47+25=' }], temperature: 0 };
assert.deepEqual((await client.models.list()).data.map((m) => m.id), ['arith']);
const whole = await client.chat.completions.create({ ...ask, logprobs: true, top_logprobs: 2 });
const said = whole.choices[0].message.content;
assert.ok(said.trim());
for (const t of whole.choices[0].logprobs.content) assert.equal(t.top_logprobs.length, 2);
let text = '', usage = null;
const stream = await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) { text += chunk.choices[0]?.delta?.content ?? ''; usage = chunk.usage ?? usage; }
assert.equal(text, said);
assert.equal(usage.total_tokens, whole.usage.total_tokens);
const prompt = { model: 'arith', prompt: '1+1=', max_tokens: 4, temperature: 0 };
const plain = (await client.completions.create({ ...prompt, logprobs: 1 })).choices[0];
assert.equal(plain.logprobs.tokens.length, plain.logprobs.token_logprobs.length);
let pieces = '';
for await (const chunk of await client.completions.create({ ...prompt, stream: true })) pieces += chunk.choices[0].text;
assert.equal(pieces, plain.text);
const say = { model: 'arith', input: [{ role: 'user', content: '47+25=' }], temperature: 0 };
const response = await client.responses.create(say);
assert.equal(response.output_text, said);
assert.equal(response.usage.total_tokens, response.usage.input_tokens + response.usage.output_tokens);
const kinds = [];
let told = '';
for await (const event of await client.responses.create({ ...say, stream: true })) {
  if (kinds.at(-1) !== event.type) kinds.push(event.type);
  if (event.type === 'response.output_text.delta') told += event.delta;
  if (event.type === 'response.completed') assert.equal(event.response.output[0].content[0].text, said);
}
assert.equal(told, said);
assert.deepEqual(kinds, ['response.created', 'response.in_progress', 'response.output_item.added', 'response.content_part.added',
  'response.output_text.delta', 'response.output_text.done', 'response.content_part.done', 'response.output_item.done', 'response.completed']);
const stored = client.responses.create({ ...say, store: true });
await assert.rejects(stored, (e) => e instanceof OpenAI.BadRequestError && e.param === 'store');
await assert.rejects(client.chat.completions.create({ ...ask, temperature: -1 }), (e) => e instanceof OpenAI.BadRequestError && e.param === 'temperature');
await assert.rejects(client.chat.completions.create({ ...ask, model: 'other' }), OpenAI.NotFoundError);
await assert.rejects(new OpenAI({ ...options, apiKey: 'wrong' }).models.list(), OpenAI.AuthenticationError);
