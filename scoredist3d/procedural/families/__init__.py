"""The families of objects: one function per family, which adds the primitives of many objects to a builder."""

from collections.abc import Callable

from scoredist3d.procedural.builder import Builder
from scoredist3d.procedural.families import buildings, figures, furniture, kitchen, nature, vehicles

BUILDERS: dict[str, Callable[[Builder], None]] = {
    "mug": kitchen.mug,
    "bottle": kitchen.bottle,
    "wine glass": kitchen.wine_glass,
    "bowl": kitchen.bowl,
    "teapot": kitchen.teapot,
    "chair": furniture.chair,
    "stool": furniture.stool,
    "table": furniture.table,
    "bed": furniture.bed,
    "bookshelf": furniture.bookshelf,
    "lamp": furniture.lamp,
    "candle": furniture.candle,
    "rocket": vehicles.rocket,
    "car": vehicles.car,
    "airplane": vehicles.airplane,
    "sailboat": vehicles.sailboat,
    "train engine": vehicles.train_engine,
    "snowman": figures.snowman,
    "robot": figures.robot,
    "teddy bear": figures.teddy_bear,
    "mushroom": nature.mushroom,
    "pine tree": nature.pine_tree,
    "flower": nature.flower,
    "cactus": nature.cactus,
    "house": buildings.house,
    "castle tower": buildings.castle_tower,
    "lighthouse": buildings.lighthouse,
    "ice cream cone": kitchen.ice_cream_cone,
}
