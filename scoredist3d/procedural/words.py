"""Short words for signs and mugs: random and common ones, held-out words, and their spelling in prompts."""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache

from scoredist3d.procedural.glyphs import CHARACTERS

WORD_LENGTHS = (2, 3, 4, 5)
_LETTERS, _DIGITS = CHARACTERS[:26], CHARACTERS[26:]
_COMMON = """
UP GO NO ON IN OUT OFF YES ONE TWO SIX TEN BAR BUS CAB CAR CAT COW DOG PIG BEE ANT FOX OWL HEN EGG HAM JAM PIE TEA
ICE CUP MUG POT PAN JAR BOX BAG HAT KEY MAP PEN INK ART TOY FUN JOY LOVE HOME KING MOM DAD SON BOY GIRL BABY BOSS
CAFE MILK SOUP CAKE RICE FISH MEAT SALT CORN BEAN PLUM PEAR KIWI LIME MINT COLA SODA BEER WINE OPEN SALE EXIT STOP
SLOW WALK PARK TAXI ZOO GYM SPA INN SHOP BANK POST FARM BARN LAKE HILL ROAD PATH GATE DOOR ROOM HALL EAST WEST SUN
MOON STAR RAIN SNOW WIND FIRE WAVE SAND ROCK TREE LEAF ROSE BIRD DUCK FROG BEAR WOLF LION HELLO PIZZA BREAD SUGAR
HONEY COCOA JUICE WATER APPLE LEMON PEACH GRAPE BERRY MELON ONION MUSIC DANCE PIANO RADIO PHOTO BOOKS HOTEL BEACH
RIVER OCEAN NORTH SOUTH TRAIN METRO PLANE TRUCK HORSE SHEEP TIGER ZEBRA MOUSE PANDA KOALA EAGLE ROBOT SPACE EARTH
QUEEN WITCH GHOST LUCKY HAPPY SMILE DREAM PEACE POWER LIGHT NIGHT TODAY QUICK QUIET EXTRA FRESH SWEET SPICY JUMBO
"""
COMMON_WORDS: tuple[str, ...] = tuple(_COMMON.split())
LETTERING_WORDS = "sign mug cup that says reads with the word in letters on one post two posts front view"
"""Words of the captions of lettered objects, apart from colors and characters."""
_P_COMMON = 0.35
_P_EACH = 0.01  # largest probability of one common word among those of its length
# A quotation that is not part of a word, as the apostrophe of "a dog's bowl" would be.
_QUOTED = re.compile(
    r"""(?<!\w)(?:'([^'"]+)'|"([^'"]+)"|\u2018([^\u2018\u2019]+)\u2019|\u201c([^\u201c\u201d]+)\u201d)(?!\w)"""
)


def is_held_out(word: str) -> bool:
    """Whether a word is kept out of the training data; about 10 % of all words are. Upper and lower case are equal."""
    return hashlib.sha256(word.upper().encode()).digest()[0] < 26


def random_word(rng: random.Random, *, held_out: bool = False, lengths: tuple[int, ...] = WORD_LENGTHS) -> str:
    """A word in upper case: a common word, or a random string of letters, of digits or of both.

    All lengths are equally likely.

    Args:
        rng: Source of all randomness.
        held_out: Whether to draw a held-out word instead of a training word.
        lengths: Possible numbers of characters.
    """
    length = rng.choice(lengths)
    common = _common_words(length, held_out)
    if rng.random() < min(_P_COMMON, _P_EACH * len(common)):
        return rng.choice(common)
    alphabet = rng.choices((_LETTERS, CHARACTERS, _DIGITS), (0.5, 0.38, 0.12))[0]
    while True:
        word = "".join(rng.choices(alphabet, k=length))
        if is_held_out(word) == held_out:
            return word


@cache
def _common_words(length: int, held_out: bool) -> tuple[str, ...]:
    return tuple(word for word in COMMON_WORDS if len(word) == length and is_held_out(word) == held_out)


def spelled(word: str) -> str:
    """The word in lower case with spaces between its characters, so that each of them is one token: "t e a"."""
    return " ".join(word.lower().replace(" ", ""))


def spell_quoted(prompt: str) -> str:
    """The prompt with its quoted words spelled: "a sign that says 'AB12'" becomes "a sign that says a b 1 2".

    Quotations that hold other characters than letters, digits and spaces do not change.
    """

    def spell(match: re.Match[str]) -> str:
        content = next(group for group in match.groups() if group is not None)
        letters = content.upper().replace(" ", "")
        known = bool(letters) and all(character in CHARACTERS for character in letters)
        return spelled(content) if known else match[0]

    return _QUOTED.sub(spell, prompt)
