"""Numbers as text: one form and one rounding for each kind of number.

The terminal, the reasons of claims, receipts, charts and notebooks use these functions. A minus
sign here is a true one (U+2212) and belongs to a number; a hyphen within a name stays a hyphen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def percent(share: float, digits: int = 0) -> str:
    """A share from 0 to 1 as a percentage.

    Near 0 and 1 it has one decimal, so that a rare outcome does not read as one that never occurs.

    >>> [percent(x) for x in (0, 0.0004, 0.003, 0.42, 0.9996, 1)]
    ['0 %', '< 0.1 %', '0.3 %', '42 %', '> 99.9 %', '100 %']
    """
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    near = 0 < share < 0.01 or 0.99 < share < 1
    decimals = max(digits, 1) if near else digits
    return f"{100 * share:.{decimals}f} %"


def span(low: float, high: float) -> str:
    """An interval of shares.

    >>> span(0.263, 0.554)
    '26 to 55 %'
    """
    return f"{percent(low).removesuffix(' %')} to {percent(high)}"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign.

    >>> signed(-0.279, 3), signed(0.5)
    ('−0.279', '+0.50')
    """
    return f"{value:+z.{digits}f}".replace("-", "\u2212")


def points(difference: float, digits: int = 0) -> str:
    """A difference of shares in percentage points, without the unit.

    >>> points(-0.25), points(0.041), points(-0.001)
    ('−25', '+4', '+0')
    """
    return signed(100 * difference, digits)


def p_value(p: float | None) -> str:
    """A p-value for a table; `–` where there is none.

    >>> p_value(0.0312), p_value(2e-7), p_value(None)
    ('0.031', '< 0.0001', '–')
    """
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def p_equals(p: float) -> str:
    """A p-value within a sentence.

    >>> p_equals(0.0312), p_equals(2e-7)
    ('p = 0.031', 'p < 0.0001')
    """
    return f"p {'' if p < 0.0001 else '= '}{p_value(p)}"


def count(number: float) -> str:
    """A count; one of more than nine digits by its power of ten.

    >>> count(12870), count(5.8e75)
    ('12,870', 'about 10^75')
    """
    return f"{number:,.0f}" if number < 1e9 else f"about 10^{math.floor(math.log10(number))}"


def extent(counts: Iterable[int]) -> str:
    """The smallest and the largest of some counts, or the one that all are.

    >>> extent([24, 18, 20]), extent([40, 40])
    ('18 to 24', '40')
    """
    known = sorted(counts)
    return count(known[0]) if known[0] == known[-1] else f"{count(known[0])} to {count(known[-1])}"


def layer_list(indices: Sequence[int]) -> str:
    """Layers in ascending order, runs of them as windows.

    >>> layer_list([19]), layer_list(range(18, 30)), layer_list([22, 24, 25])
    ('19', '18..29', '22, 24..25')
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
