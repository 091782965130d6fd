"""Writes docs/examples/logbook.txt, which `make run` reads: a lighthouse keeper's diary, every entry different.

    python tools/make_logbook.py > docs/examples/logbook.txt

It is longer than the demo model's trained context (8,192 tokens). One early entry tells the secret, and no other does.
"""

from __future__ import annotations

import datetime
import random

SEED, N_DAYS, SECRET_DAY = 1893, 212, 41
FIRST_DAY = datetime.date(1893, 1, 2)
SECRET = (
    "The inspector came with a new lock for the oil store. "
    "The secret word is marigold, and he made me say it twice: the secret word is marigold."
)

WINDS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
FORCES = ["light airs", "a light breeze", "a fresh breeze", "half a gale", "a gale", "a whole gale", "a dead calm"]
SKIES = [
    "the sky clear to the horizon", "low cloud on the hills", "rain before noon", "snow showers", "a hard frost",
    "fog until the turn of the tide", "a ring round the moon", "thunder far out", "a high sea on the reef", "haze",
]  # fmt: skip
RIGS = ["barque", "brig", "schooner", "ketch", "steamer", "trawler", "lugger", "full-rigged ship", "collier"]
SHIPS = [
    "Helena", "Constance", "Bonnie Jean", "Albatross", "Two Brothers", "Margarethe", "Northern Star", "Ranger",
    "Sea Holly", "Patience", "Loch Ewe", "Fortuna", "Kittiwake", "Good Intent", "Harriet", "Vesta", "Swallow",
]  # fmt: skip
CARGOES = ["timber", "coal", "herring", "slate", "grain", "wool", "salt", "pit props", "china clay", "cattle", "iron"]
PORTS = ["Leith", "Bergen", "Hull", "Riga", "Aberdeen", "Cork", "Hamburg", "Stornoway", "Dundee", "Liverpool", "Oslo"]
WORK = [
    "I painted the gallery rail", "I cleaned the lens with spirit of wine", "I mended the hen house door",
    "I trimmed the wicks twice", "I greased the clockwork and wound it to the top", "I carried eleven cans of oil up",
    "I limed the west wall", "I split driftwood for the stove", "I set potatoes in the lower bed",
    "I sewed a new flag for the signal mast", "I sounded the well and found four feet", "I polished the lamp's brass",
    "I caulked the boat", "I replaced two panes on the weather side", "I wrote the monthly return", "I swept the flue",
]  # fmt: skip
EVENTS = [
    "A seal slept on the landing all afternoon.", "The dog found a dead gannet and was proud of it.",
    "My wife baked with the last of the white flour.", "The mail came, three letters and a newspaper a week old.",
    "Two geese passed over, very high.", "A cask came ashore, empty, with Dutch letters on it.",
    "The boy from the farm brought eggs and stayed for soup.", "I read to the children from the book of travels.",
    "A bottle stood in the weed with no paper in it.", "The cat had kittens in the coal shed.",
    "My tooth is better since the cloves.", "The lamp burned without a flaw from dusk to sunrise.",
    "Somebody sang on a boat out in the dark.", "We counted nineteen sail before supper.",
    "The clock lost four minutes and I set it by the noon gun.", "Old Murdo rowed out with tobacco and the news.",
    "The hens have stopped laying.", "I dreamed of the city and was glad to wake.", "The tide left a plank of teak.",
    "A kestrel hung over the point for an hour.", "The spring below the path is running again.",
]  # fmt: skip


def entry(day: datetime.date, rng: random.Random) -> str:
    """Returns the entry of one day, some forty words."""
    hour = rng.choice(["at first light", "at nine", "at noon", "toward four", "at dusk", "an hour after midnight"])
    parts = [
        f"{day.day} {day:%B %Y}. Wind {rng.choice(WINDS)}, {rng.choice(FORCES)}, {rng.choice(SKIES)}.",
        f"The {rng.choice(RIGS)} {rng.choice(SHIPS)} passed {hour} with {rng.choice(CARGOES)} for {rng.choice(PORTS)}.",
        f"{rng.choice(WORK)}, and {rng.choice(WORK).replace('I ', '', 1)}.",
        rng.choice(EVENTS),
    ]
    return " ".join(parts[: rng.choice((3, 4, 4))])


def logbook() -> str:
    """Returns the whole book, one paragraph a day."""
    rng = random.Random(SEED)
    days = [FIRST_DAY + datetime.timedelta(n) for n in range(N_DAYS)]
    entries = [entry(day, rng) for day in days]
    entries[SECRET_DAY] += " " + SECRET
    return "The logbook of the keeper of Skerry Head lighthouse\n\n" + "\n\n".join(entries) + "\n"


if __name__ == "__main__":
    print(logbook(), end="")
