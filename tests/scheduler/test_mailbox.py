"""Text that waits for a reader: joined, bounded, and in order."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.protocol.messages import Delta, Done, Prefilled, TokenLogprob
from shimpy.scheduler.mailbox import MAX_UNREAD_BYTES, Mail, Mailbox

PREFILLED = Prefilled(request=1, n_prompt=3, n_cached=0)
DONE = Done(
    request=1, reason="stop", n_prompt=3, n_cached=0, n_generated=2, prefill_s=0, decode_s=0
)


def delta(text: str) -> Delta:
    logprobs = [TokenLogprob(id=1, text=text, logprob=0.0)]
    return Delta(request=1, text=text, n_tokens=1, logprobs=logprobs)


async def test_text_runs_together() -> None:
    mailbox = Mailbox()
    for mail in (PREFILLED, delta("a"), delta("b"), DONE):
        mailbox.put(mail)
    assert await mailbox.get() == PREFILLED
    joined = await mailbox.get()
    assert isinstance(joined, Delta)
    assert (joined.text, joined.n_tokens, len(joined.logprobs)) == ("ab", 2, 2)
    assert await mailbox.get() == DONE


async def test_waits_for_mail() -> None:
    mailbox = Mailbox()
    reader = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    assert not reader.done()
    mailbox.put(DONE)
    assert await reader == DONE


async def test_what_came_before_the_end_is_read_first() -> None:
    mailbox = Mailbox()
    mailbox.put(delta("a"))
    mailbox.close(ValueError("first"))
    mailbox.close(ValueError("second"))
    assert isinstance(await mailbox.get(), Delta)
    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            await mailbox.get()


def test_a_request_is_answered_by_its_last_word_only() -> None:
    mailbox = Mailbox()
    mailbox.put(PREFILLED)
    mailbox.put(delta("a"))
    assert not mailbox.is_answered
    mailbox.put(DONE)
    assert mailbox.is_answered


@pytest.mark.parametrize("text", ["", "x", "🙂" * 1000], ids=["empty", "short", "long"])
async def test_unread_text_is_bounded(text: str) -> None:
    """Pieces without text count too: there may be endlessly many."""
    mailbox = Mailbox()
    for _ in range(MAX_UNREAD_BYTES // 64 + 1):
        mailbox.put(delta(text))
        if mailbox.is_overfull:
            break
    assert mailbox.is_overfull
    await mailbox.get()
    assert not mailbox.is_overfull


@given(mails=st.lists(st.sampled_from([PREFILLED, delta("a"), delta("b")])), reads=st.data())
def test_nothing_is_lost_or_reordered(mails: list[Mail], reads: st.DataObject) -> None:
    mailbox, seen = Mailbox(), []
    for mail in mails:
        mailbox.put(mail)
        if reads.draw(st.booleans()):
            seen.append(asyncio.run(mailbox.get()))
    mailbox.put(DONE)
    while not seen or seen[-1] != DONE:
        seen.append(asyncio.run(mailbox.get()))
    assert flat(seen) == flat([*mails, DONE])


def flat(mails: list[Mail]) -> str:
    return "".join(mail.text if isinstance(mail, Delta) else type(mail).__name__ for mail in mails)
