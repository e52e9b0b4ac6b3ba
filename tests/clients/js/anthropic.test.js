// Anthropic's SDK: only its base URL is changed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import Anthropic from '@anthropic-ai/sdk'
import { parameters, text, url, user } from './shared.js'

const client = new Anthropic({ baseURL: url, apiKey: 'any', maxRetries: 0 })
const asked = { model: 'chain', max_tokens: 200, messages: user }

test('create', async () => {
  const message = await client.messages.create({ ...asked, system: 'Be brief.' })
  assert.equal(message.content[0].text, text)
  assert.equal(message.stop_reason, 'end_turn')
})

test('a stream', async () => {
  const stream = client.messages.stream(asked)
  let said = ''
  stream.on('text', (delta) => { said += delta })
  const final = await stream.finalMessage()
  assert.equal(said, text)
  assert.equal(final.content[0].text, text)
})

test('a tool is called', async () => {
  const tools = [{ name: 'get_weather', description: 'Weather.', input_schema: parameters }]
  const message = await client.messages.create({ ...asked, model: 'caller', tools })
  const call = message.content.find((block) => block.type === 'tool_use')
  assert.deepEqual(call.input, { city: 'Köln' })
  assert.equal(message.stop_reason, 'tool_use')
})

test('tokens are counted', async () => {
  const { input_tokens } = await client.messages.countTokens({ model: 'chain', messages: user })
  assert.ok(input_tokens > 5)
})

test('errors', async () => {
  await assert.rejects(
    client.messages.create({ ...asked, model: 'nix' }),
    Anthropic.NotFoundError,
  )
})
