"""Names, numbers and identifiers that evaluations hide in texts, drawn so that none comes twice."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import numpy as np

from pyggml_repkv.errors import InputError

ADJECTIVES = """
able agile amber ample ancient annual arctic aware basic bitter blank blind blond blue blunt bold brave brief bright
brisk broad bronze brown busy calm candid careful cheap clean clear clever cold cosmic crimson crisp curious curly damp
daring dark deep dense direct distant dry dull dusty eager early elder empty exact faint fair famous fancy fast fierce
final firm flat fluent foggy fond fresh frosty gentle giant gifted glad golden grand green happy hardy harsh heavy
hidden hollow honest humble icy idle ivory jolly juicy keen kind large late lazy light lively local lonely long loud
loyal lucky lunar marble mellow merry mighty mild misty modest narrow neat noble noisy novel oval pale patient plain
polite proud purple quick quiet rapid rare royal rural rusty salty scarlet shiny silent silver simple sleepy small
""".split()  # noqa: SIM905

NOUNS = """
acorn anchor apple arrow aspen badger bakery bamboo banner barley barn basket beacon beaver bell birch bison blanket
blossom boat bottle branch bread bridge broom bucket butter button cabin cactus camel candle canoe canyon carpet carrot
castle cedar cellar cherry chimney circle cliff clock cloud clover coast cobbler comet compass copper coral corner
cottage cotton cradle crane creek cricket crow crown curtain daisy desert donkey dragon drum eagle ember engine falcon
feather fern ferry fiddle field finch flute forest fountain fox garden garlic gate ginger glacier glove goose grape
guitar hammer harbor harvest hawk hazel hedge helmet heron hill honey horse house island jacket jasmine jungle kettle
kitchen kite ladder lake lantern lemon library lily lion lizard lobster locket magnet mango maple market meadow mirror
monkey moon moth mountain needle nest nutmeg oak ocean olive onion orchard otter owl oyster paddle palace panther parrot
pasture pebble pepper piano pigeon pillow pine planet plum pond poppy prairie pumpkin rabbit raven ribbon river robin
rocket rose saddle sailor salmon sandal school shadow shell shovel sparrow spider spoon squirrel station stone summit
sunset swan table temple thistle thunder tiger tower trumpet tulip tunnel turtle valley velvet village violin walnut
walrus wheat whistle willow window winter wolf
""".split()  # noqa: SIM905


def names(rng: np.random.Generator, n: int) -> list[str]:
    """Returns n different names, as amber-falcon. Raises InputError where there are not so many."""
    n_most = len(ADJECTIVES) * len(NOUNS)
    if n > n_most:
        raise InputError(f"{n} different names are needed, and there are {n_most}: ask for a shorter text")
    picked = rng.choice(n_most, n, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in picked]


def groups_of_names(rng: np.random.Generator, n: int, n_alike: int = 1) -> list[list[str]]:
    """Returns n groups of n_alike names with a noun of their own; a group's names differ in their adjectives.

    Raises InputError where there are not so many.
    """
    if n > len(NOUNS) or n_alike > len(ADJECTIVES):
        raise InputError(f"{n} different nouns are needed, and there are {len(NOUNS)}")
    return [
        [f"{adjective}-{noun}" for adjective in rng.choice(ADJECTIVES, n_alike, replace=False)]
        for noun in rng.choice(NOUNS, n, replace=False)
    ]


def numbers(rng: np.random.Generator, n: int, n_digits: int = 5) -> list[str]:
    """Returns n different numbers of n_digits digits, of which the first is not 0."""
    least = 10 ** (n_digits - 1)
    return different(n, lambda: str(rng.integers(least, 10 * least)))


def uuids(rng: np.random.Generator, n: int) -> list[str]:
    """Returns n different random UUIDs."""
    return different(n, lambda: str(uuid.UUID(bytes=rng.bytes(16), version=4)))


def letters(rng: np.random.Generator, n: int, length: int, alphabet: str) -> list[str]:
    """Returns n different strings of so many letters of an alphabet."""
    return different(n, lambda: "".join(rng.choice([*alphabet], length)))


def different(n: int, draw: Callable[[], str]) -> list[str]:
    """Returns n different results of draw()."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)
