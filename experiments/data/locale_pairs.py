"""German phrases and their English translations, from Babel's locale data.

Babel knows how each language writes dates, times, intervals, numbers with units and
currencies, and what it calls territories and languages: a small translation task with
different word order, inflection, compounds and copied numbers, without a download.
"""

import datetime
import random
from collections.abc import Callable, Iterator

from babel import Locale
from babel.dates import (
    format_date,
    format_interval,
    format_skeleton,
    format_time,
    format_timedelta,
)
from babel.lists import format_list
from babel.numbers import format_currency
from babel.units import format_unit

Pair = tuple[str, str]  # German, English

GERMAN, ENGLISH = Locale("de"), Locale("en")
FIRST_DAY = datetime.date(1950, 1, 1)
DAYS = 36_500
UNITS = ("second", "minute", "hour", "day", "week", "month", "year")  # of durations


def _both(render: Callable[[Locale], str]) -> Pair:
    """Writes one thing in both languages, with plain spaces."""
    german, english = (" ".join(render(x).split()) for x in (GERMAN, ENGLISH))
    return german, english


def _shared_names(attribute: str) -> list[str]:
    """Returns the codes that both languages have a name for."""
    german, english = (getattr(x, attribute) for x in (GERMAN, ENGLISH))
    return sorted(german.keys() & english.keys())


def _number(rng: random.Random) -> int | float:
    """Draws a number of one to five digits, every other one with a decimal."""
    number = int(10 ** rng.uniform(0, 5))
    return number if rng.random() < 0.5 else number + rng.randint(1, 9) / 10


def _day(rng: random.Random) -> datetime.date:
    return FIRST_DAY + datetime.timedelta(rng.randrange(DAYS))


def _dates(rng: random.Random) -> Iterator[Pair]:
    while True:
        day, style = _day(rng), rng.choice(("full", "long", "medium"))
        yield _both(lambda x, d=day, s=style: format_date(d, s, locale=x))


def _days_and_months(rng: random.Random) -> Iterator[Pair]:
    while True:
        day, style = _day(rng), rng.choice(("yMMMM", "MMMMEEEEd", "yMMMEd", "yQQQQ"))
        yield _both(lambda x, d=day, s=style: format_skeleton(s, d, locale=x))


def _intervals(rng: random.Random) -> Iterator[Pair]:
    while True:
        start = _day(rng)
        end = start + datetime.timedelta(rng.randint(1, 400))
        yield _both(lambda x, a=start, b=end: format_interval(a, b, "yMMMd", locale=x))


def _times(rng: random.Random) -> Iterator[Pair]:
    while True:
        time = datetime.time(rng.randrange(24), rng.randrange(60), rng.randrange(60))
        style = rng.choice(("short", "medium"))
        yield _both(lambda x, t=time, s=style: format_time(t, s, locale=x))


def _durations(rng: random.Random) -> Iterator[Pair]:
    seconds = dict(
        zip(UNITS, (1, 60, 3600, 86400, 604800, 2592000, 31536000), strict=True)
    )
    while True:
        unit, number = rng.choice(UNITS), rng.randint(-99, 99)
        delta = datetime.timedelta(seconds=number * seconds[unit])
        direction = rng.random() < 0.7
        yield _both(
            lambda x, d=delta, u=unit, a=direction: format_timedelta(
                d, granularity=u, threshold=1000, add_direction=a, locale=x
            )
        )


def _measures(rng: random.Random) -> Iterator[Pair]:
    units = _shared_names("unit_display_names")
    while True:
        number, unit = _number(rng), rng.choice(units)
        yield _both(lambda x, n=number, u=unit: format_unit(n, u, locale=x))


def _amounts(rng: random.Random) -> Iterator[Pair]:
    currencies = _shared_names("currencies")
    while True:
        number, code = _number(rng), rng.choice(currencies)
        yield _both(
            lambda x, n=number, c=code: format_currency(
                n, c, locale=x, format_type="name", currency_digits=False
            )
        )


def _names(attribute: str) -> Callable[[random.Random], Iterator[Pair]]:
    """Returns what draws one to three names, joined by "and" or "or"."""

    def draw(rng: random.Random) -> Iterator[Pair]:
        codes = _shared_names(attribute)
        while True:
            chosen = rng.sample(codes, rng.randint(1, 3))
            style = rng.choice(("standard", "or"))
            yield _both(
                lambda x, c=chosen, s=style: format_list(
                    [getattr(x, attribute)[code] for code in c], style=s, locale=x
                )
            )

    return draw


# What is drawn, and how often; duplicates are dropped.
KINDS: dict[Callable[[random.Random], Iterator[Pair]], int] = {
    _dates: 8_000,
    _days_and_months: 4_000,
    _intervals: 4_000,
    _times: 3_000,
    _durations: 1_500,
    _measures: 6_000,
    _amounts: 6_000,
    _names("territories"): 3_000,
    _names("languages"): 3_000,
}


def locale_pairs(seed: int = 0) -> list[Pair]:
    """Returns at least 20,000 pairs, no two with the same German, in random order.

    The same seed and the same release of Babel give the same pairs.
    """
    rng = random.Random(seed)
    english: dict[str, str] = {}
    for kind, number in KINDS.items():
        for _, (german, translation) in zip(range(number), kind(rng), strict=False):
            english.setdefault(german, translation)
    pairs = list(english.items())
    rng.shuffle(pairs)
    return pairs
