// What the tests of all clients share: where the daemon is, and what its models say.

export const url = process.env.SHIMPY_URL
export const text = process.env.SHIMPY_CHAIN_TEXT

export const user = [{ role: 'user', content: 'Weather in Köln?' }]

export const parameters = {
  type: 'object',
  properties: { city: { type: 'string', maxLength: 12 } },
  required: ['city'],
}

export const weather = {
  type: 'function',
  function: { name: 'get_weather', description: 'Say what the weather is.', parameters },
}

export const pair = {
  type: 'object',
  properties: { a: { type: 'integer' }, b: { type: 'boolean' } },
  required: ['a', 'b'],
  additionalProperties: false,
}
