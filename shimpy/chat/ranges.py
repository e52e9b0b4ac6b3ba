"""Numbers between two bounds, as grammar expressions over their digits."""

from __future__ import annotations

from fractions import Fraction

import msgspec

from shimpy.chat.gbnf import Rules

MAX_DIGITS = 16
_ANY = "[0-9]"


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers from `low` to `high`; None: no bound. Open ends leave the bound out."""

    low: Fraction | None = None
    high: Fraction | None = None
    low_open: bool = False
    high_open: bool = False

    def mirrored(self) -> Bounds:
        """Return the same numbers with the other sign."""
        return Bounds(
            low=None if self.high is None else -self.high,
            high=None if self.low is None else -self.low,
            low_open=self.high_open,
            high_open=self.low_open,
        )


def integer_rule(rules: Rules, bounds: Bounds) -> str:
    """Return an expression for the integers within the bounds.

    Raises:
        ValueError: there are none, or a bound has too many digits.
    """
    low, high = _whole(bounds)
    options = []
    if low is None or low < 0:
        largest = None if low is None else -low
        smallest = 1 if high is None or high >= 0 else -high
        if largest is None or largest >= smallest:
            options.append(f'"-" ({_natural(smallest, largest)})')
    if high is None or high >= 0:
        smallest = max(0, low or 0)
        if high is None or high >= smallest:
            options.append(_natural(smallest, high))
    if not options:
        raise ValueError(f"there is no integer from {low} to {high}")
    return rules.add("int", " | ".join(options))


def _whole(bounds: Bounds) -> tuple[int | None, int | None]:
    low = high = None
    if bounds.low is not None:
        low = -(-bounds.low.numerator // bounds.low.denominator)
        low += bounds.low_open and low == bounds.low
    if bounds.high is not None:
        high = bounds.high.numerator // bounds.high.denominator
        high -= bounds.high_open and high == bounds.high
    for bound in (low, high):
        if bound is not None and len(str(abs(bound))) > MAX_DIGITS:
            raise ValueError(f"{bound} has more than {MAX_DIGITS} digits")
    return low, high


def _natural(low: int, high: int | None) -> str:
    """Return alternatives for the whole numbers from `low` >= 0 to `high`, by their length."""
    top = high if high is not None else 10**MAX_DIGITS - 1
    options = []
    for n_digits in range(len(str(low)), len(str(top)) + 1):
        first = 10 ** (n_digits - 1) if n_digits > 1 else 0
        options.append(_same_length(str(max(low, first)), str(min(top, 10**n_digits - 1))))
    return " | ".join(options)


def _same_length(low: str, high: str) -> str:
    """Return an expression for the digit strings from `low` to `high`, of the same length."""
    if not low:
        return '""'
    n_rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return _digits(low[0], high[0]) + _some(n_rest)
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_length(low[1:], high[1:])})'
    options = [f'"{low[0]}" ({_same_length(low[1:], "9" * n_rest)})']
    if int(low[0]) + 1 < int(high[0]):
        options.append(_digits(chr(ord(low[0]) + 1), chr(ord(high[0]) - 1)) + _some(n_rest))
    options.append(f'"{high[0]}" ({_same_length("0" * n_rest, high[1:])})')
    return " | ".join(options)


def _digits(low: str, high: str) -> str:
    return f"[{low}-{high}]" if low != high else f'"{low}"'


def _some(n: int) -> str:
    return {0: "", 1: f" {_ANY}"}.get(n, f" {_ANY}{{{n}}}")


# --- numbers with a fraction -------------------------------------------------------------------

_FREE = f'("." {_ANY}{{1,{MAX_DIGITS}}})?'


def number_rule(rules: Rules, bounds: Bounds) -> str:
    """Return an expression for the decimal numbers within the bounds, without exponents.

    Raises:
        ValueError: there are none, or a bound has too many digits.
    """
    options = []
    if bounds.low is None or bounds.low < 0:
        options += [f'"-" {option}' for option in _decimals(bounds.mirrored())]
    options += _decimals(bounds)
    if not options:
        raise ValueError(f"there is no number from {_text(bounds.low)} to {_text(bounds.high)}")
    return rules.add("num", " | ".join(options))


def _text(bound: Fraction | None) -> str:
    return "anything" if bound is None else f"{float(bound):g}"


def _decimals(bounds: Bounds) -> list[str]:
    """Return alternatives for the numbers >= 0 within the bounds."""
    low = _Digits(0, "", is_open=False)
    if bounds.low is not None and bounds.low >= 0:
        low = _digits_of(bounds.low, is_open=bounds.low_open)
    if bounds.high is None:
        return [*_from_whole(low.whole, low, None), f"({_natural(low.whole + 1, None)}) {_FREE}"]
    if bounds.high < max(bounds.low or 0, 0):
        return []
    high = _digits_of(bounds.high, is_open=bounds.high_open)
    if low.whole == high.whole:
        return _from_whole(low.whole, low, high)
    between = []
    if low.whole + 1 < high.whole:
        between = [f"({_natural(low.whole + 1, high.whole - 1)}) {_FREE}"]
    return [
        *_from_whole(low.whole, low, None),
        *between,
        *_from_whole(high.whole, None, high),
    ]


class _Digits(msgspec.Struct, frozen=True):
    """A bound: its whole part, and the digits behind its point without zeros at the end."""

    whole: int
    fraction: str
    is_open: bool

    def rest(self) -> _Digits:
        """Return the bound behind its first digit."""
        return _Digits(self.whole, self.fraction[1:], self.is_open)


def _digits_of(bound: Fraction, *, is_open: bool) -> _Digits:
    whole = bound.numerator // bound.denominator
    digits = (bound - whole) * 10**MAX_DIGITS
    if digits.denominator != 1 or whole >= 10**MAX_DIGITS:
        raise ValueError(f"{float(bound):g} has more than {MAX_DIGITS} digits")
    return _Digits(whole, f"{int(digits):0{MAX_DIGITS}d}".rstrip("0"), is_open)


def _from_whole(whole: int, low: _Digits | None, high: _Digits | None) -> list[str]:
    """Return alternatives for the numbers with this whole part; None: no bound on that side."""
    tail = _tail(low, high)
    if tail is None:
        return []
    may_end, options = tail
    inner = ['""'] if may_end else []
    inner += [f'"." ({" | ".join(options)})'] if options else []
    return [f'"{whole}" ({" | ".join(inner)})']


def _tail(low: _Digits | None, high: _Digits | None) -> tuple[bool, list[str]] | None:
    """Return whether a fraction may end here, and what may follow instead; None: it can't go on.

    Only the bounds' digits from here on count; None: the digits so far are inside that bound.
    """
    if low is not None and not low.fraction and not low.is_open:
        low = None
    if high is not None and not high.fraction:
        return None if high.is_open or low is not None else (True, [])
    if low is None and high is None:
        return True, [f"{_ANY}{{1,{MAX_DIGITS}}}"]
    if low is not None and not low.fraction and high is None:
        return False, [f'"0"{{0,4}} [1-9] {_ANY}{{0,{MAX_DIGITS}}}']
    first = int(low.fraction[0]) if low is not None and low.fraction else 0
    last = int(high.fraction[0]) if high is not None else 9
    options = []
    for digit in sorted({first, last}) if first <= last else ():
        tail = _tail(
            low.rest() if low is not None and digit == first else None,
            high.rest() if high is not None and digit == last else None,
        )
        if tail is not None:
            inner = (['""'] if tail[0] else []) + tail[1]
            options.append(f'"{digit}" ({" | ".join(inner)})')
    if last - first > 1:
        options.append(f"[{first + 1}-{last - 1}] {_ANY}{{0,{MAX_DIGITS}}}")
    return (low is None, options) if low is None or options else None
