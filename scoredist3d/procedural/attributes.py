"""Names and values of the attributes of objects, as stated in their captions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """A structural variant of a family of objects.

    Attributes:
        adjective: Word before the noun ("round table"), or None.
        feature: Phrase after "with" ("two sails"), or None.
        parts: Names of the parts that have the second color; singular names take an article.
        symmetry: Order of rotational symmetry, if it differs from the family's.
    """

    adjective: str | None = None
    feature: str | None = None
    parts: tuple[str, ...] = ()
    symmetry: int | None = None


@dataclass(frozen=True)
class Category:
    """A family of objects.

    Attributes:
        name: Canonical name.
        synonyms: Other names.
        modes: Structural variants.
        symmetry: Order of rotational symmetry about z; 0 for bodies of revolution, whose azimuth is undefined.
    """

    name: str
    synonyms: tuple[str, ...]
    modes: tuple[Mode, ...]
    symmetry: int = 1


# sRGB as displayed.
COLOR_TABLE: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.10),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (1.00, 0.90, 0.15),
    "green": (0.12, 0.65, 0.18),
    "cyan": (0.20, 0.85, 0.90),
    "blue": (0.10, 0.22, 0.88),
    "purple": (0.52, 0.12, 0.74),
    "pink": (1.00, 0.56, 0.76),
    "brown": (0.45, 0.25, 0.10),
    "black": (0.13, 0.13, 0.14),
    "white": (0.90, 0.90, 0.89),
    "gray": (0.48, 0.48, 0.49),
}
COLORS: tuple[str, ...] = tuple(COLOR_TABLE)
COLOR_VALUES: tuple[tuple[float, float, float], ...] = tuple(COLOR_TABLE.values())
# Striped, checkered and dotted use the second color; wooden and brick are materials in shades of the main color.
PATTERNS: tuple[str, ...] = ("plain", "striped", "checkered", "dotted", "wooden", "brick")
PATTERN_NOUNS: dict[str, tuple[str, ...]] = {
    "striped": ("stripes",),
    "checkered": ("checks",),
    "dotted": ("dots", "spots"),
}
# Second color of a pattern whose caption names only one color: white, except on light colors.
DEFAULT_SECOND: dict[str, str] = {color: "black" if color in ("white", "yellow") else "white" for color in COLORS}
PATTERN_WEIGHTS: tuple[float, ...] = (0.45, 0.11, 0.13, 0.12, 0.07, 0.12)
# Unstated objects ("") are as matt as those called matt.
FINISHES: tuple[str, ...] = ("", "shiny", "matt", "metal")
FINISH_SYNONYMS: dict[str, str] = {"matt": "matte"}
FINISH_WEIGHTS: tuple[float, ...] = (0.61, 0.13, 0.13, 0.13)
# Colors of materials unless a caption states another one.
NATURAL_COLORS: dict[str, str] = {"wooden": "brown", "metal": "gray"}
WOOD_COLOR: tuple[float, float, float] = (0.66, 0.43, 0.22)  # of brown wooden objects; their grain is darker
SIZES: tuple[str, ...] = ("", "tall", "short", "wide")
SIZE_WEIGHTS: tuple[float, ...] = (0.55, 0.15, 0.15, 0.15)
# Scale factors of (x, y, z), applied before the object is fitted into the unit ball again.
SIZE_STRETCH: tuple[tuple[float, float, float], ...] = (
    (1, 1, 1),
    (0.85, 0.85, 1.3),
    (1.05, 1.05, 0.68),
    (0.9, 1.4, 0.9),
)

PLAIN, STRIPED, CHECKERED, DOTTED, WOODEN, BRICK = range(6)
SHINY, MATT, METAL = 1, 2, 3


def _modes(*modes: tuple[str | None, str | None], parts: tuple[str, ...]) -> tuple[Mode, ...]:
    return tuple(Mode(adjective, feature, parts) for adjective, feature in modes)


FAMILIES: tuple[Category, ...] = (
    Category("mug", ("cup", "coffee mug"), _modes((None, "round handle"), (None, "square handle"), parts=("handle",))),
    Category("bottle", ("flask",), _modes(("round", None), ("pointed", None), parts=("cap", "label")), 0),
    Category("wine glass", ("goblet",), _modes(("round", None), ("pointed", None), parts=("stem", "base")), 0),
    Category("bowl", ("dish",), _modes(("round", None), ("straight", None), parts=("rim", "base")), 0),
    Category("teapot", ("kettle",), _modes(("round", None), ("straight", None), parts=("lid", "handle"))),
    Category("chair", (), _modes((None, None), (None, "arms"), parts=("seat",))),
    Category(
        "stool", ("bar stool",), (Mode(None, "three legs", ("seat",), 3), Mode(None, "four legs", ("seat",), 4)), 0
    ),
    Category("table", ("desk",), (Mode("square", None, ("legs",)), Mode("round", None, ("stand",), 0)), 2),
    Category("bed", (), _modes((None, "one pillow"), (None, "two pillows"), parts=("frame", "headboard"))),
    Category("bookshelf", ("bookcase",), _modes((None, "two shelves"), (None, "three shelves"), parts=("books",))),
    Category("lamp", ("table lamp",), _modes(("pointed", None), ("round", None), parts=("stand", "base")), 0),
    Category("candle", (), _modes((None, "one flame"), (None, "three flames"), parts=("holder",))),
    Category(
        "rocket",
        ("rocket ship", "spaceship"),
        _modes((None, "three fins"), (None, "four fins"), parts=("fins", "nose")),
    ),
    Category("car", ("automobile",), _modes((None, None), (None, "spoiler"), parts=("roof",))),
    Category("airplane", ("plane",), _modes((None, "engines"), (None, "propeller"), parts=("tail",))),
    Category("sailboat", ("sailing boat", "boat"), _modes((None, "one sail"), (None, "two sails"), parts=("hull",))),
    Category(
        "train engine",
        ("train", "locomotive"),
        _modes((None, "four wheels"), (None, "six wheels"), parts=("roof", "chimney")),
    ),
    Category(
        "snowman",
        (),
        (
            Mode(None, "two balls", ("scarf",)),
            Mode(None, "three balls", ("scarf",)),
            Mode(None, "hat", ("hat", "scarf")),
            Mode(None, "hat and three balls", ("hat", "scarf")),
        ),
    ),
    Category("robot", (), _modes((None, "square head"), (None, "round head"), parts=("head",))),
    Category("teddy bear", ("teddy", "bear"), _modes(("sitting", None), ("standing", None), parts=("belly", "snout"))),
    Category("mushroom", ("toadstool",), _modes(("round", None), ("pointed", None), parts=("stem",)), 0),
    Category(
        "pine tree", ("tree", "fir tree"), _modes((None, "two tiers"), (None, "three tiers"), parts=("trunk",)), 0
    ),
    Category("flower", ("blossom",), _modes((None, "five petals"), (None, "eight petals"), parts=("middle",))),
    Category("cactus", (), _modes((None, "one arm"), (None, "two arms"), parts=("pot",))),
    Category("house", ("cottage",), _modes((None, "gable roof"), (None, "pointed roof"), parts=("roof",))),
    Category("castle tower", ("castle", "tower"), _modes(("round", None), ("square", None), parts=("flag",))),
    Category("lighthouse", (), _modes((None, "pointed roof"), (None, "round roof"), parts=("roof",))),
    Category("ice cream cone", ("ice cream",), _modes((None, "one scoop"), (None, "two scoops"), parts=("cone",)), 0),
    Category("bicycle", ("bike",), _modes((None, None), (None, "basket"), parts=("wheels",))),
    Category(
        "ladder",
        (),
        (Mode("folding", None, ("rungs",)), Mode("straight", None, ("rungs",), 2)),
    ),
    Category(
        "umbrella",
        ("parasol",),
        (Mode(None, "curved handle", ("handle",)), Mode(None, "straight handle", ("handle",), 0)),
    ),
    Category(
        "street lamp",
        ("lamppost", "street light"),
        (Mode(None, "one lantern", ("base",)), Mode(None, "two lanterns", ("base",), 2)),
    ),
    Category("fork", ("dinner fork",), _modes((None, "three tines"), (None, "four tines"), parts=("handle",)), 2),
    Category("guitar", (), _modes(("acoustic", None), ("electric", None), parts=("neck",))),
    Category("windmill", ("mill",), _modes((None, "three blades"), (None, "four blades"), parts=("blades",))),
    Category("helicopter", ("chopper",), _modes((None, "two blades"), (None, "four blades"), parts=("blades",))),
    Category("balloon", (), (Mode(None, "string", ("string",)), Mode(None, "basket", ("basket",), 4)), 0),
    Category("clock", ("alarm clock",), _modes(("round", None), ("square", None), parts=("bells",))),
    Category("racket", ("tennis racket",), _modes(("round", None), ("oval", None), parts=("handle",)), 2),
    Category("swing", ("swing set",), (Mode(None, "one seat", ("seat",)), Mode(None, "two seats", ("seats",))), 2),
    Category("broom", ("broomstick",), (Mode("round", None, ("stick",)), Mode("flat", None, ("stick",), 2)), 0),
    Category("bench", ("park bench",), _modes((None, None), (None, "arms"), parts=("legs",))),
    Category("cat", ("kitten",), _modes(("sitting", None), ("standing", None), parts=("ears", "snout"))),
    Category("dog", ("puppy",), _modes(("sitting", None), ("standing", None), parts=("ears",))),
    Category("duck", ("duckling",), _modes(("sitting", None), ("standing", None), parts=("wings",))),
    Category("fish", ("goldfish",), _modes((None, "round tail"), (None, "forked tail"), parts=("tail", "fins"))),
    Category("spider", (), _modes(("round", None), ("long", None), parts=("legs",))),
    Category("palm tree", ("palm",), _modes(("straight", None), ("curved", None), parts=("trunk",))),
    Category("sword", (), _modes((None, "straight guard"), (None, "round guard"), parts=("guard",)), 2),
    Category("key", ("door key",), _modes((None, "two teeth"), (None, "three teeth"), parts=("ring",))),
    Category("hammer", (), _modes((None, "claw"), (None, "round head"), parts=("handle",))),
    Category("mailbox", ("postbox",), _modes(("round", None), ("flat", None), parts=("flag",))),
    Category("barrel", ("keg",), (Mode("standing", None, ("hoops",)), Mode("lying", None, ("hoops",), 2)), 0),
)
CATEGORIES: tuple[str, ...] = tuple(family.name for family in FAMILIES)
MODES: dict[str, tuple[Mode, ...]] = {family.name: family.modes for family in FAMILIES}
AZIMUTH_SYMMETRY: dict[str, int] = {family.name: family.symmetry for family in FAMILIES}
# Part and feature names that take no article, and numerals at the start of a feature.
PLURALS = frozenset(
    {
        "legs",
        "books",
        "fins",
        "arms",
        "engines",
        "wheels",
        "rungs",
        "blades",
        "bells",
        "seats",
        "ears",
        "wings",
        "hoops",
    }
)
COUNTS = frozenset({"one", "two", "three", "four", "five", "six", "eight"})
