"""Conversations as text, both ways: prompts out of messages, answers out of generated text.

    messages ──template──▶ prompt parts ─── the model ───▶ text ──parser──▶ content, calls
                                               ▲
                           schema ──▶ grammar ─┘

`template` renders by the model's Jinja template, `gotemplate` by Ollama's; `guard` keeps the
conversation's own text from becoming control tokens. `formats` tells how a model writes its
thoughts and calls, `parser` reads them as they come, `answers` makes grammars for whole answers,
`fim` makes prompts to fill in.

The package is pure: it reads no clock and does no I/O. Templates and schemas are untrusted, so
that all work on them is bounded; some of it takes milliseconds and belongs off the event loop.
"""
