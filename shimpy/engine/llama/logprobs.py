"""Log-probabilities of the chosen token and of its likeliest rivals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.choosers import likeliest
from shimpy.engine.llama.vocab import Vocab
from shimpy.protocol.messages import TokenLogprob

Row = npt.NDArray[np.float32]


def token_logprob(vocab: Vocab, logits: Row, token: int, n_top: int) -> TokenLogprob:
    """Return the natural log of the token's probability by these logits, and the `n_top` best."""
    peak = logits.max()
    log_sum = peak + np.log(np.exp(logits - peak, dtype=np.float32).sum(dtype=np.float64))
    best = likeliest(logits, min(n_top, len(logits))) if n_top > 0 else np.empty(0, np.int64)
    best = best[np.argsort(-logits[best], kind="stable")][:n_top]

    def entry(one: int) -> TokenLogprob:
        data = vocab.piece(one, special=True)
        text = data.decode(errors="replace")
        return TokenLogprob(id=one, text=text, logprob=float(logits[one] - log_sum), data=data)

    chosen = entry(token)
    return TokenLogprob(
        id=token,
        text=chosen.text,
        logprob=chosen.logprob,
        data=chosen.data,
        top=[entry(int(one)) for one in best],
    )
