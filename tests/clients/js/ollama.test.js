// The ollama package: only its host is changed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Ollama } from 'ollama'
import { pair, text, url, user, weather } from './shared.js'

const ollama = new Ollama({ host: url })

async function collect(stream, take) {
  let said = ''
  for await (const part of stream) said += take(part) ?? ''
  return said
}

test('generate', async () => {
  const whole = await ollama.generate({ model: 'chain', prompt: 'hi' })
  assert.equal(whole.response, text)
  const stream = await ollama.generate({ model: 'chain', prompt: 'hi', stream: true })
  assert.equal(await collect(stream, (part) => part.response), text)
})

test('chat', async () => {
  const whole = await ollama.chat({ model: 'chain', messages: user, keep_alive: '5m' })
  assert.equal(whole.message.content, text)
  const stream = await ollama.chat({ model: 'chain', messages: user, stream: true })
  assert.equal(await collect(stream, (part) => part.message.content), text)
})

test('a tool is called', async () => {
  const answer = await ollama.chat({ model: 'caller', messages: user, tools: [weather] })
  assert.equal(answer.message.tool_calls[0].function.name, 'get_weather')
  assert.deepEqual(answer.message.tool_calls[0].function.arguments, { city: 'Köln' })
})

test('thinking is apart', async () => {
  const answer = await ollama.chat({ model: 'thinker', messages: user, think: true })
  assert.equal(answer.message.thinking, 'Rivers first.')
  assert.equal(answer.message.content, 'The Rhine flows there.')
})

test('a schema is kept', async () => {
  const answer = await ollama.chat({ model: 'llama', messages: user, format: pair })
  assert.equal(typeof JSON.parse(answer.message.content).b, 'boolean')
})

test('embeddings', async () => {
  const found = await ollama.embed({ model: 'bert', input: ['a b', 'c'] })
  assert.equal(found.embeddings.length, 2)
  assert.ok(Math.abs(Math.hypot(...found.embeddings[0]) - 1) < 1e-4)
})

test('models', async () => {
  const { models } = await ollama.list()
  assert.ok(models.some((model) => model.name === 'chain:latest'))
  const shown = await ollama.show({ model: 'chain' })
  assert.equal(shown.details.family, 'llama')
  assert.ok(Array.isArray((await ollama.ps()).models))
})

test('an abort ends the stream', async () => {
  const stream = await ollama.generate({ model: 'endless', prompt: 'x', stream: true })
  await assert.rejects(async () => {
    for await (const _ of stream) stream.abort()
  }, { name: 'AbortError' })
})

test('errors', async () => {
  await assert.rejects(ollama.chat({ model: 'nix', messages: user }), /model 'nix' not found/)
})
