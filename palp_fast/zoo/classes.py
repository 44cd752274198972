"""Class nouns of the emoji-64 world: Unicode subgroups, split or merged until each has at least 8 seen members."""

BY_SUBGROUP = {
    "animal-amphibian": "reptile", "animal-reptile": "reptile", "animal-bird": "bird", "animal-bug": "bug",
    "animal-mammal": "animal", "animal-marine": "sea creature",
    "arts-crafts": "toy", "game": "toy", "award-medal": "decoration",
    "book-paper": "book", "clothing": "garment", "computer": "device", "phone": "device", "light-video": "device",
    "dishware": "household item", "drink": "drink", "event": "decoration",
    "food-asian": "meal", "food-fruit": "fruit", "food-prepared": "meal", "food-sweet": "dessert",
    "food-vegetable": "vegetable", "hotel": "household item", "household": "household item",
    "lock": "tool", "tool": "tool", "mail": "stationery", "medical": "instrument", "science": "instrument",
    "money": "money", "music": "audio device", "sound": "audio device", "musical-instrument": "musical instrument",
    "office": "stationery", "writing": "stationery", "other-object": "household item",
    "place-building": "building", "place-religious": "building", "place-geographic": "landscape",
    "place-map": "landscape", "place-other": "attraction", "plant-flower": "flower", "plant-other": "plant",
    "sky-weather": "weather", "sport": "sports item", "time": "household item",
    "transport-air": "aircraft", "transport-ground": "vehicle", "transport-water": "boat",
}

_MOONS = "moon crescent gibbous sun star planet comet milky"
_SHOES = ("ballet shoes|flat shoe|high-heeled shoe|hiking boot|mans shoe|running shoe|thong sandal|womans boot|"
          "womans sandal|socks|roller skate|ice skate")
_BAGS = "backpack|clutch bag|handbag|purse|shopping bags|luggage|briefcase|basket|toolbox|package|takeout box"
_CARS = ("automobile|oncoming automobile|oncoming police car|oncoming taxi|police car|racing car|sport utility vehicle|"
         "taxi|ambulance|minibus|pickup truck|delivery truck|fire engine|articulated lorry|bus|oncoming bus|trolleybus|"
         "auto rickshaw|tractor")
_TRAINS = ("bullet train|high-speed train|light rail|locomotive|metro|monorail|mountain railway|railway car|station|"
           "train|tram|tram car|suspension railway")
_BALLS = ("american football|baseball|basketball|rugby football|soccer ball|softball|tennis|volleyball|bowling|"
          "pool 8 ball|yarn")

BY_NAME = {
    **dict.fromkeys(_SHOES.split("|"), "shoe"), **dict.fromkeys(_BAGS.split("|"), "bag"),
    **dict.fromkeys(_CARS.split("|"), "car"), **dict.fromkeys(_TRAINS.split("|"), "train"),
    **dict.fromkeys(_BALLS.split("|"), "ball"),
    "trophy": "decoration", "flower playing cards": "toy", "flashlight": "tool", "rosette": "decoration",
    "coin": "money",
}


def class_noun(name: str, subgroup: str) -> str:
    """Class noun of a subject, from its cleaned name and Unicode subgroup."""
    if name in BY_NAME:
        return BY_NAME[name]
    if subgroup == "sky-weather" and any(word in name.split() for word in _MOONS.split()):
        return "celestial body"
    return BY_SUBGROUP[subgroup]
