"""Usual heights of real objects by noun: the sizes of exports with ``exporter.height=real-world``.

The heights are estimates by the authors, of one typical object each, in the position in which the embedded prior shows
it: a fork, a key or a sword stands upright, a fish swims.
"""

from __future__ import annotations

from types import MappingProxyType

from scoredist3d.priors.vocabulary import Nouns

# Height in meters: nouns. All kinds of objects of the embedded prior with their synonyms.
_TABLE = """
0.03: spider
0.07: key, door key
0.08: bowl, dish, goldfish
0.1: mug, cup, coffee mug, mushroom, toadstool
0.12: duckling, clock, alarm clock
0.15: fish
0.18: teapot, kettle, ice cream cone, ice cream, kitten
0.2: candle, fork, dinner fork
0.22: wine glass, goblet
0.25: flask
0.3: bottle, cat, puppy
0.33: hammer
0.35: duck
0.4: teddy bear, teddy, bear, flower, blossom
0.45: stool
0.5: lamp, table lamp
0.6: dog
0.7: racket, tennis racket
0.75: table, desk, bar stool
0.85: umbrella, bench, park bench
0.9: chair, barrel, keg
1: bed, guitar, sword
1.05: bicycle, bike
1.1: mailbox, postbox
1.2: balloon
1.4: broom, broomstick
1.5: car, automobile
1.6: snowman
1.7: robot
1.8: bookshelf, bookcase
2: cactus
2.2: swing, swing set
2.4: parasol
2.5: ladder
3.5: helicopter, chopper
4: airplane, plane, train engine, train, locomotive
5: street lamp, lamppost, street light
6: cottage
8: house
10: palm tree, palm
12: sailboat, sailing boat, boat
15: pine tree, tree, fir tree, windmill, mill
20: lighthouse
25: castle tower, castle, tower
50: rocket, rocket ship, spaceship
"""
REAL_HEIGHTS = MappingProxyType(
    {
        noun: float(meters)
        for meters, _, nouns in (line.partition(": ") for line in _TABLE.strip().splitlines())
        for noun in nouns.split(", ")
    }
)
"""Mapping from nouns to heights in meters."""
_NOUNS = Nouns(dict.fromkeys(REAL_HEIGHTS, ()))


def real_height(prompt: str) -> float:
    """The usual height, in meters, of the kind of object that a prompt names.

    Raises:
        ValueError: The prompt names no kind with a known height, or kinds of different heights.
    """
    named = {noun: REAL_HEIGHTS[noun] for noun in _NOUNS.named_in(prompt)}
    if len(set(named.values())) == 1:
        return next(iter(named.values()))
    if not named:
        what = f"no height is known for {prompt!r}"
    else:
        heights = ", ".join(f"{noun} {height:g} m" for noun, height in named.items())
        what = f"{prompt!r} names objects of several heights ({heights})"
    raise ValueError(f"{what}; set the height of the whole object in meters, as in exporter.height=1.5")
