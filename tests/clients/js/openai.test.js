// OpenAI's SDK: only its base URL is changed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import OpenAI from 'openai'
import { zodResponseFormat } from 'openai/helpers/zod'
import { z } from 'zod'
import { pair, parameters, text, url, user, weather } from './shared.js'

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'any', maxRetries: 0 })

test('chat', async () => {
  const whole = await client.chat.completions.create({ model: 'chain', messages: user, n: 2 })
  assert.deepEqual(whole.choices.map((choice) => choice.message.content), [text, text])
})

test('a streamed chat', async () => {
  const stream = client.chat.completions.stream({
    model: 'chain',
    messages: user,
    stream_options: { include_usage: true },
  })
  let said = ''
  stream.on('content', (delta) => { said += delta })
  const final = await stream.finalChatCompletion()
  assert.equal(said, text)
  assert.equal(final.choices[0].message.content, text)
  assert.ok(final.usage.completion_tokens > 5)
})

test('a tool is called', async () => {
  const stream = client.chat.completions.stream({
    model: 'caller', messages: user, tools: [weather],
  })
  const [choice] = (await stream.finalChatCompletion()).choices
  assert.equal(choice.finish_reason, 'tool_calls')
  const [call] = choice.message.tool_calls
  assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Köln' })
})

test('a schema is parsed', async () => {
  const format = zodResponseFormat(z.object({ a: z.number().int(), b: z.boolean() }), 'pair')
  const parsed = await client.chat.completions.parse({
    model: 'llama', messages: user, response_format: format,
  })
  assert.equal(typeof parsed.choices[0].message.parsed.b, 'boolean')
})

test('completions', async () => {
  const whole = await client.completions.create({ model: 'chain', prompt: ['a', 'b'] })
  assert.deepEqual(whole.choices.map((choice) => choice.text), [text, text])
})

test('responses', async () => {
  const whole = await client.responses.create({ model: 'chain', input: 'hi' })
  assert.equal(whole.output_text, text)
  const stream = client.responses.stream({
    model: 'llama',
    input: 'hi',
    tools: [{ type: 'function', name: 'get_weather', parameters, strict: true }],
    tool_choice: 'required',
  })
  const final = await stream.finalResponse()
  assert.equal(final.output[0].type, 'function_call')
  assert.deepEqual(Object.keys(JSON.parse(final.output[0].arguments)), ['city'])
  const shaped = await client.responses.create({
    model: 'llama',
    input: 'hi',
    text: { format: { type: 'json_schema', name: 'pair', schema: pair, strict: true } },
  })
  assert.equal(typeof JSON.parse(shaped.output_text).b, 'boolean')
})

test('embeddings', async () => {
  const found = await client.embeddings.create({ model: 'bert', input: ['a b', 'c'] })
  assert.equal(found.data.length, 2)
  assert.ok(Math.abs(Math.hypot(...found.data[0].embedding) - 1) < 1e-4)
})

test('models', async () => {
  const names = []
  for await (const model of client.models.list()) names.push(model.id)
  assert.ok(names.includes('chain:latest'))
  assert.equal((await client.models.retrieve('chain')).id, 'chain')
})

test('errors', async () => {
  await assert.rejects(
    client.chat.completions.create({ model: 'nix', messages: user }),
    OpenAI.NotFoundError,
  )
  await assert.rejects(
    client.chat.completions.create({ model: 'chain', messages: [] }),
    OpenAI.BadRequestError,
  )
})
