"""English-German text that needs no download: dates, amounts and lists, formatted with the CLDR data in Babel."""

from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from functools import partial
from random import Random

from babel import Locale
from babel.dates import format_date, format_skeleton
from babel.lists import format_list
from babel.numbers import format_currency, get_currency_precision, get_territory_currencies
from babel.units import format_unit
from datasets import Dataset

from .data import SPLIT_SEED


CLDR = "dates, quantities, currencies and territories of the CLDR, English to German"
ENGLISH, GERMAN = Locale("en"), Locale("de")
DATES, AMOUNTS, LISTS = 2500, 4500, 2000
EVERYDAY = ("area", "duration", "length", "mass", "speed", "temperature", "volume")


def cldr_pairs(source_column: str, target_column: str) -> Dataset:
    """English and German dates, quantities, amounts of money and lists of territories, as the CLDR formats them.

    Each date, number and set of territories occurs in one pair only, so no held-out pair can be recalled from
    training: the model must learn the words and the patterns.
    """
    rng = Random(SPLIT_SEED)
    phrases = [*_dates(rng), *_amounts(rng), *_territories(rng)]
    return Dataset.from_dict(
        {
            source_column: [phrase(locale=ENGLISH) for phrase in phrases],
            target_column: [phrase(locale=GERMAN) for phrase in phrases],
        }
    )


def _dates(rng: Random) -> Iterator[Callable[..., str]]:
    styles = (
        partial(format_date, format="full"),
        partial(format_date, format="long"),
        partial(format_date, format="medium"),
        lambda day, locale: format_skeleton("yMMMEd", day, locale=locale),
    )
    days = range(date(1925, 1, 1).toordinal(), date(2075, 1, 1).toordinal())
    for day in rng.sample(days, DATES):
        yield partial(rng.choice(styles), date.fromordinal(day))


def _amounts(rng: Random) -> Iterator[Callable[..., str]]:
    units = sorted(unit for unit in GERMAN.unit_display_names if unit.startswith(EVERYDAY))
    in_use = {code for territory in ENGLISH.territories for code in get_territory_currencies(territory)}
    # Two decimals, so that no two amounts are rounded to the same one.
    currencies = sorted(code for code in in_use if code in GERMAN.currencies and get_currency_precision(code) == 2)
    # The integer parts differ, and so do the numbers in every format.
    for whole in rng.sample(range(20_000), AMOUNTS):
        decimals = rng.randrange(3)
        number = whole + Decimal(rng.randrange(10**decimals)).scaleb(-decimals)
        if rng.random() < 0.5:
            yield partial(format_unit, number, rng.choice(units))
        else:
            yield partial(format_currency, number, rng.choice(currencies), format_type="name")


def _territories(rng: Random) -> Iterator[Callable[..., str]]:
    codes = sorted(ENGLISH.territories.keys() & GERMAN.territories.keys())
    sampled: set[frozenset[str]] = set()
    while len(sampled) < LISTS:
        chosen = rng.sample(codes, rng.choice((2, 3)))
        if frozenset(chosen) not in sampled:
            sampled.add(frozenset(chosen))
            yield partial(_list_territories, chosen)


def _list_territories(codes: list[str], locale: Locale) -> str:
    return format_list([locale.territories[code] for code in codes], locale=locale)
