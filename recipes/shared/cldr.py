"""English text with its German translation that is everywhere: what the CLDR data that ships in Babel writes."""

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
    """English and German dates, quantities, amounts of money and lists of territories, as the CLDR writes them.

    Each date, number and set of territories is in one pair only. So whichever pairs are held out, what they say is
    new: the words and the patterns have to be learned, and cannot be recalled together.
    """
    draw = Random(SPLIT_SEED)
    phrases = [*_dates(draw), *_amounts(draw), *_territories(draw)]
    return Dataset.from_dict(
        {
            source_column: [phrase(locale=ENGLISH) for phrase in phrases],
            target_column: [phrase(locale=GERMAN) for phrase in phrases],
        }
    )


def _dates(draw: Random) -> Iterator[Callable[..., str]]:
    styles = (
        partial(format_date, format="full"),
        partial(format_date, format="long"),
        partial(format_date, format="medium"),
        lambda day, locale: format_skeleton("yMMMEd", day, locale=locale),
    )
    days = range(date(1925, 1, 1).toordinal(), date(2075, 1, 1).toordinal())
    for day in draw.sample(days, DATES):
        yield partial(draw.choice(styles), date.fromordinal(day))


def _amounts(draw: Random) -> Iterator[Callable[..., str]]:
    units = sorted(unit for unit in GERMAN.unit_display_names if unit.startswith(EVERYDAY))
    in_use = {code for territory in ENGLISH.territories for code in get_territory_currencies(territory)}
    # With two decimals, no amount is rounded to another one.
    currencies = sorted(code for code in in_use if code in GERMAN.currencies and get_currency_precision(code) == 2)
    # The numbers differ before the decimal point, and so in every way of writing them.
    for whole in draw.sample(range(20_000), AMOUNTS):
        decimals = draw.randrange(3)
        number = whole + Decimal(draw.randrange(10**decimals)).scaleb(-decimals)
        if draw.random() < 0.5:
            yield partial(format_unit, number, draw.choice(units))
        else:
            yield partial(format_currency, number, draw.choice(currencies), format_type="name")


def _territories(draw: Random) -> Iterator[Callable[..., str]]:
    codes = sorted(ENGLISH.territories.keys() & GERMAN.territories.keys())
    drawn: set[frozenset[str]] = set()
    while len(drawn) < LISTS:
        chosen = draw.sample(codes, draw.choice((2, 3)))
        if frozenset(chosen) not in drawn:
            drawn.add(frozenset(chosen))
            yield partial(_list_territories, chosen)


def _list_territories(codes: list[str], locale: Locale) -> str:
    return format_list([locale.territories[code] for code in codes], locale=locale)
