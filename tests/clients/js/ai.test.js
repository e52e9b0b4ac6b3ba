// The AI SDK with its Ollama provider: only the provider's base URL is changed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { embedMany, generateObject, generateText, streamText, tool } from 'ai'
import { createOllama } from 'ollama-ai-provider-v2'
import { z } from 'zod'
import { text, url } from './shared.js'

const ollama = createOllama({ baseURL: `${url}/api` })

test('generateText', async () => {
  const whole = await generateText({ model: ollama('chain'), system: 'Be brief.', prompt: 'hi' })
  assert.equal(whole.text, text)
  assert.equal(whole.finishReason, 'stop')
})

test('streamText', async () => {
  const stream = streamText({ model: ollama('chain'), prompt: 'hi' })
  let said = ''
  for await (const delta of stream.textStream) said += delta
  assert.equal(said, text)
})

test('a tool is called', async () => {
  const whole = await generateText({
    model: ollama('caller'),
    prompt: 'Weather in Köln?',
    tools: {
      get_weather: tool({
        description: 'Say what the weather is.',
        inputSchema: z.object({ city: z.string() }),
        execute: async ({ city }) => `sunny in ${city}`,
      }),
    },
  })
  assert.deepEqual(whole.toolCalls[0].input, { city: 'Köln' })
  assert.equal(whole.toolResults[0].output, 'sunny in Köln')
})

test('generateObject', async () => {
  const { object } = await generateObject({
    model: ollama('llama'),
    schema: z.object({ a: z.number().int(), b: z.boolean() }),
    prompt: 'two values',
  })
  assert.equal(typeof object.b, 'boolean')
})

test('embedMany', async () => {
  const { embeddings } = await embedMany({
    model: ollama.embedding('bert'),
    values: ['a b', 'c'],
  })
  assert.equal(embeddings.length, 2)
})

test('errors', async () => {
  const asked = { model: ollama('nix'), prompt: 'hi', maxRetries: 0 }
  await assert.rejects(generateText(asked), { statusCode: 404 })
})
