"""Nouns without a family of objects, by the family that resembles them the most."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# A word may appear in several rows; the first family that a prior knows counts.
_TABLE = """
cat: lion tiger panther leopard cheetah lynx puma jaguar
dog: wolf fox horse pony donkey cow goat sheep pig lamb deer zebra giraffe camel hyena animal pet cub mule llama
duck: bird chicken hen goose swan eagle owl parrot penguin pigeon crow turkey seagull robin
fish: shark whale dolphin salmon tuna carp trout seal eel
spider: insect bug beetle ant bee fly crab scorpion octopus lobster tarantula
teddy bear: panda koala monkey gorilla rabbit bunny hamster mouse squirrel lion tiger elephant dragon dinosaur animal
teddy bear: cat dog kitten puppy wolf fox pig cow sheep doll plush unicorn frog duck bird hippo rhino
teddy bear: horse pony donkey goat lamb deer zebra giraffe camel hen chicken penguin owl parrot
robot: android cyborg person man woman boy girl human child soldier knight astronaut superhero alien monster zombie
snowman: santa clown gnome elf pumpkin ghost figure
mug: glass tumbler beaker teacup jug pitcher can tin
bottle: vase jar flacon perfume thermos pitcher jug
wine glass: trophy chalice glass grail cocktail
bowl: plate basin tray saucer pan pot bathtub sink basket nest bucket
teapot: coffeepot can pot samovar jug
barrel: bucket bin drum crate box tank vase
chair: sofa couch armchair throne seat recliner loveseat rocker
stool: ottoman pouf pedestal tripod
table: counter workbench altar piano
bed: sofa couch crib mattress cot hammock
bookshelf: shelf cupboard cabinet wardrobe closet dresser drawer fridge refrigerator
bench: sofa couch pew seat
lamp: light lantern chandelier torch
street lamp: traffic signpost pole
candle: torch candlestick lighter matchstick
clock: watch stopwatch timer compass
rocket: missile spacecraft shuttle torpedo firework
car: truck van bus taxi jeep tractor tank vehicle lorry suv wagon limousine ambulance kart
airplane: jet glider drone bomber airliner aircraft bird eagle butterfly
helicopter: drone quadcopter
sailboat: ship yacht canoe kayak ferry vessel raft submarine galleon
train engine: tram railway wagon trolley subway
bicycle: motorcycle scooter tricycle motorbike moped
mushroom: fungus truffle jellyfish
umbrella: tent canopy
pine tree: bush shrub forest spruce cypress hedge plant
palm tree: bush fern plant coconut oak willow
flower: rose tulip daisy sunflower lily orchid plant poppy
cactus: succulent aloe
house: hut cabin barn villa tent church school building shed temple mansion garage igloo
castle tower: fortress keep palace skyscraper chimney pillar column
lighthouse: skyscraper obelisk minaret
windmill: turbine fan propeller
ice cream cone: dessert lollipop cupcake cake sundae popsicle
balloon: ball globe bubble moon sun planet
ladder: stairs staircase scaffold
fork: spoon knife cutlery spatula tongs chopstick
hammer: axe mallet pickaxe wrench screwdriver saw tool
sword: knife dagger katana blade spear saber scythe
broom: mop rake brush shovel
guitar: violin ukulele banjo cello lute harp bass
racket: bat paddle tennis
key: lock
mailbox: letterbox birdhouse
swing: hammock seesaw
"""


def related_words(kinds: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Nouns that are not known, by the known kind that resembles them; each noun appears once.

    Args:
        kinds: Mapping from the known kinds to their synonyms.
    """
    result: dict[str, list[str]] = {}
    placed = {name for kind, synonyms in kinds.items() for name in (kind, *synonyms)}
    for row in _TABLE.strip().splitlines():
        kind, _, words = row.partition(": ")
        if kind in kinds:
            new = [word for word in words.split() if word not in placed]
            placed.update(new)
            result.setdefault(kind, []).extend(new)
    return result
