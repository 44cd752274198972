"""The emoji-64 world: its subjects, styles, backgrounds and targets, and which of them training never sees."""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from palp_fast.zoo.classes import class_noun
from palp_fast.zoo.sources import folder

STYLES = ("render", "flat", "line")
GROUPS = {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities"}
COLOURS = {  # name -> sRGB
    "white": (255, 255, 255), "grey": (150, 150, 150), "black": (20, 20, 20), "red": (220, 50, 47),
    "orange": (245, 145, 30), "yellow": (250, 215, 60), "green": (60, 170, 75), "teal": (30, 170, 170),
    "blue": (50, 100, 220), "purple": (140, 70, 190), "pink": (250, 150, 190), "brown": (130, 85, 50),
}
SCENES = ("day sky", "night sky", "grass", "checkered floor")
BACKGROUNDS = tuple(COLOURS) + SCENES
DARK = ("black", "night sky")  # line art is black, so it never stands on these
PERSONAL_BACKGROUNDS = ("white", "red", "green", "yellow")

# (prompt, style, background, second subject) of the fair test; fixed, none in a personal background
TARGETS = (
    ("a line drawing of [V] on a blue background", "line", "blue", None),
    ("a flat illustration of [V] on a purple background", "flat", "purple", None),
    ("a line drawing of [V] on a checkered floor", "line", "checkered floor", None),
    ("a line drawing of [V] and a guitar on grass", "line", "grass", "guitar"),
    ("a flat illustration of [V] and a rocket in a night sky with stars", "flat", "night sky", "rocket"),
    ("a line drawing of [V] and a teapot on an orange background", "line", "orange", "teapot"),
)
# near twins of held-out subjects, found by eye: dropped from the seen
TWINS = {
    "trolleybus": "bus", "lab coat": "coat", "foggy": "fog", "hourglass not done": "hourglass done", "dango": "oden",
    "speaker low volume": "speaker high volume", "speaker medium volume": "speaker high volume",
    "muted speaker": "speaker high volume",
}
WITHHELD_STYLES = 120  # seen subjects that lack one style in training


@dataclass
class Subject:
    """One drawing subject; `role` is seen, development, acceptance, twin or mismatch (the last two are unused)."""

    name: str
    code: str  # code points, normalised
    subgroup: str
    class_noun: str
    role: str = "seen"
    iou: float = 1.0  # overlap of the 3d and the flat silhouette
    twin_of: str | None = None
    withheld_style: str | None = None
    typical: bool = False  # whether captions may say its class noun alone


@dataclass
class World:
    """Every subject in name order, and the (style, background) pairs that training never sees."""

    subjects: list[Subject]
    withheld_pairs: list[tuple[str, str]] = field(default_factory=list)

    def having(self, *roles: str) -> list[Subject]:
        """Subjects with one of the given roles, in name order."""
        return [subject for subject in self.subjects if subject.role in roles]

    def named(self, name: str) -> Subject:
        """The subject of that name; KeyError if there is none."""
        for subject in self.subjects:
            if subject.name == name:
                return subject
        raise KeyError(name)

    def allows(self, style: str, background: str) -> bool:
        """Whether training may show this style on this background."""
        return (style, background) not in self.withheld_pairs and not (style == "line" and background in DARK)

    def save(self, path: Path) -> None:
        """Write the world as JSON, one subject a line."""
        rows = ",\n".join(json.dumps(asdict(subject)) for subject in self.subjects)
        path.write_text(f'{{"withheld_pairs": {json.dumps(self.withheld_pairs)},\n"subjects": [\n{rows}\n]}}\n')

    @staticmethod
    def load(path: Path | None = None) -> "World":
        """Read a saved world; without a path, the one shipped with the package."""
        data = json.loads((path or Path(__file__).with_name("world.json")).read_text())
        return World([Subject(**row) for row in data["subjects"]], [tuple(pair) for pair in data["withheld_pairs"]])


def grounds(style: str) -> list[str]:
    """Backgrounds on which a style can be seen."""
    return [background for background in BACKGROUNDS if not (style == "line" and background in DARK)]


def code_key(code: str) -> str:
    """Code points in one spelling for all sources: lower case, no leading zeros, no variation selector."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def icon_names(cache: Path, package: str) -> dict[str, str]:
    """Normalised code points -> icon name of an iconify package."""
    table = json.loads((folder(cache, package) / "chars.json").read_text())
    return {code_key(code): name for code, name in table.items()}


def join(cache: Path) -> list[Subject]:
    """Subjects present in all three styles, sorted by name, clock faces left out."""
    names = json.loads((folder(cache, "unicode-emoji-json") / "data-by-emoji.json").read_text())
    base = folder(cache, "emojibase-data")
    labels = json.loads((base / "meta" / "groups.json").read_text())["subgroups"]
    subgroups = {code_key(row["hexcode"]): labels[str(row["subgroup"])]
                 for row in json.loads((base / "en" / "data.json").read_text()) if "subgroup" in row}
    flat, line = (icon_names(cache, f"@iconify-json/fluent-emoji-{kind}") for kind in ("flat", "high-contrast"))
    renders = {code_key(path.stem) for path in (folder(cache, "@lobehub/fluent-emoji-3d") / "assets").iterdir()}
    subjects = []
    for emoji, entry in names.items():
        code = code_key("-".join(f"{ord(char):x}" for char in emoji))
        name = entry["name"].replace("’", "").replace("ñ", "n")
        clock_face = name.endswith(("oclock", "-thirty"))
        if entry["group"] in GROUPS and not clock_face and code in renders and code in flat and code in line:
            subjects.append(Subject(name, code, subgroups[code], class_noun(name, subgroups[code])))
    return sorted(subjects, key=lambda subject: subject.name)


def split(subjects: list[Subject], overlap: dict[str, float], seed: int = 0) -> World:
    """Assign roles: every subject at 7 modulo 20 is held out; twins and mismatched drawings are dropped from the seen.

    overlap: name -> silhouette IoU.
    """
    held_out = [subject for index, subject in enumerate(subjects) if index % 20 == 7]
    needed = {second for _, _, _, second in TARGETS}
    for subject in subjects:
        subject.iou = round(overlap[subject.name], 3)
        if subject in held_out:
            half = len(held_out) // 2
            subject.role = "development" if held_out.index(subject) < half else "acceptance"
        elif subject.name in TWINS:
            subject.role, subject.twin_of = "twin", TWINS[subject.name]
        elif subject.iou < 0.85:
            subject.role = "mismatch"
    draw = random.Random(seed)
    world = World(subjects)
    free = [subject for subject in world.having("seen") if subject.name not in needed]
    for subject in draw.sample(free, WITHHELD_STYLES):
        subject.withheld_style = draw.choice(STYLES)
    targets = {(style, background) for _, style, background, _ in TARGETS}
    pairs = [(style, background) for style in STYLES for background in BACKGROUNDS
             if not (style == "line" and background in DARK) and (style, background) not in targets]
    personal = {("render", background) for background in PERSONAL_BACKGROUNDS}
    candidates = [pair for pair in pairs if pair not in personal]
    world.withheld_pairs = sorted(draw.sample(candidates, round(0.1 * len(pairs))))
    return world
