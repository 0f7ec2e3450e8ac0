"""German phrases and their English translations, from Babel's locale data.

Babel knows how each language writes dates, times, intervals, numbers with units and
currencies, and what it calls territories and languages: a small translation task with
different word order, inflection, compounds and copied numbers, without a download.
"""

import datetime
import functools
import random
from collections.abc import Callable
from typing import Any

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
Renders = Callable[[Any], str]  # in a locale

LOCALES = (Locale("de"), Locale("en"))
FIRST_DAY = datetime.date(1950, 1, 1)
DAYS = 36_500
SECONDS = {
    "second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800,
    "month": 2592000, "year": 31536000,
}  # fmt: skip


@functools.cache
def _shared_names(attribute: str) -> list[str]:
    """Returns the codes that both languages have a name for."""
    german, english = (getattr(x, attribute) for x in LOCALES)
    return sorted(german.keys() & english.keys())


def _number(rng: random.Random) -> int | float:
    """Draws a number of one to five digits, every other one with a decimal."""
    number = int(10 ** rng.uniform(0, 5))
    return number if rng.random() < 0.5 else number + rng.randint(1, 9) / 10


def _day(rng: random.Random) -> datetime.date:
    return FIRST_DAY + datetime.timedelta(rng.randrange(DAYS))


def _date(rng: random.Random) -> Renders:
    day, style = _day(rng), rng.choice(("full", "long", "medium"))
    return lambda x: format_date(day, style, locale=x)


def _day_and_month(rng: random.Random) -> Renders:
    day, style = _day(rng), rng.choice(("yMMMM", "MMMMEEEEd", "yMMMEd", "yQQQQ"))
    return lambda x: format_skeleton(style, day, locale=x)


def _interval(rng: random.Random) -> Renders:
    start = _day(rng)
    end = start + datetime.timedelta(rng.randint(1, 400))
    return lambda x: format_interval(start, end, "yMMMd", locale=x)


def _time(rng: random.Random) -> Renders:
    time = datetime.time(rng.randrange(24), rng.randrange(60), rng.randrange(60))
    style = rng.choice(("short", "medium"))
    return lambda x: format_time(time, style, locale=x)


def _duration(rng: random.Random) -> Renders:
    unit: Any = rng.choice(tuple(SECONDS))
    number = rng.randint(-99, 99)
    delta, direction = number * SECONDS[unit], rng.random() < 0.7
    return lambda x: format_timedelta(
        delta, granularity=unit, threshold=1000, add_direction=direction, locale=x
    )


def _measure(rng: random.Random) -> Renders:
    number, unit = _number(rng), rng.choice(_shared_names("unit_display_names"))
    return lambda x: format_unit(number, unit, locale=x)


def _amount(rng: random.Random) -> Renders:
    number, code = _number(rng), rng.choice(_shared_names("currencies"))
    return lambda x: format_currency(
        number, code, locale=x, format_type="name", currency_digits=False
    )


def _names(attribute: str, rng: random.Random) -> Renders:
    """Draws one to three names, joined by "and" or "or"."""
    chosen = rng.sample(_shared_names(attribute), rng.randint(1, 3))
    style = rng.choice(("standard", "or"))
    return lambda x: format_list(
        [getattr(x, attribute)[code] for code in chosen], style=style, locale=x
    )


# What is drawn, and how often; duplicates are dropped.
KINDS: dict[Callable[[random.Random], Renders], int] = {
    _date: 8_000,
    _day_and_month: 4_000,
    _interval: 4_000,
    _time: 3_000,
    _duration: 1_500,
    _measure: 6_000,
    _amount: 6_000,
    functools.partial(_names, "territories"): 3_000,
    functools.partial(_names, "languages"): 3_000,
}


def locale_pairs(seed: int = 0) -> list[Pair]:
    """Returns at least 20,000 pairs, no two with the same German, in random order.

    The same seed and the same release of Babel give the same pairs.
    """
    rng = random.Random(seed)
    english: dict[str, str] = {}
    for kind, number in KINDS.items():
        for _ in range(number):
            render = kind(rng)
            # With plain spaces.
            german, translation = (" ".join(render(x).split()) for x in LOCALES)
            english.setdefault(german, translation)
    pairs = list(english.items())
    rng.shuffle(pairs)
    return pairs
