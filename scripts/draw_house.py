"""Draw the rooms of the package and their imports: docs/assets/concepts/house-{light,dark}.svg.

python scripts/draw_house.py            # writes the pictures
python scripts/draw_house.py --check    # fails if one would change

Rooms and arrows are read from the imports in src, so the picture cannot differ from the code. A
room is one floor above the highest room that it imports. An arrow that follows from two others is
not drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

from draw_concepts import FOLDER, THEMES, WIDTH, Canvas
from imports import imports_of
from pages import keep, wants_check


SRC = Path(__file__).resolve().parent.parent / "src" / "hf_familial"
# room: its content; every room of src needs a line
ROOMS = {
    "cli": "hf-familial",
    "isoflop": "designs, sweeps",
    "training": "any Trainer",
    "handoff": "device, server",
    "hub": "export, push",
    "evaluation": "every exit",
    "decoding": "faster passes",
    "flops": "FLOPs, bytes",
    "checkpoints": "safetensors",
    "models": "family, relay",
    "scaling": "laws, fits",
}
ISLAND = "scaling"
GROUND = ("errors", "runs", "paths", "_files", "_records", "_wording")
ALONE = ("scripts", "extension", "__main__", "toy")  # small helpers
ROW, BOX, GAP = 74, 46, 8  # distance of floors, height of a box, space between boxes


def room_imports() -> dict[str, set[str]]:
    """Return for each room the rooms that its modules import, at any time."""
    found: dict[str, set[str]] = {}
    for each in imports_of(SRC):
        room = each.module.split(".")[0]
        target = [*each.target.split("."), ""][1]
        if room in ROOMS and target in ROOMS and room != target:
            found.setdefault(room, set()).add(target)
    return found


def floors(imports: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each room: 0 for rooms that import none."""

    def floor(room: str) -> int:
        return max((floor(below) + 1 for below in imports.get(room, ())), default=0)

    level = {room: floor(room) for room in ROOMS}
    # the island is drawn right below the room that uses it
    users = [room for room in ROOMS if ISLAND in imports.get(room, ())]
    return level | {ISLAND: min(level[room] for room in users) - 1}


def direct(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the arrows that do not follow from two others."""

    def reached(room: str) -> set[str]:
        below = imports.get(room, set())
        return below.union(*(reached(each) for each in below))

    return [
        (room, below)
        for room in ROOMS
        for below in sorted(imports.get(room, ()))
        if not any(below in reached(other) for other in imports[room] - {below})
    ]


def house(theme: str) -> Canvas:
    """Draw the rooms floor by floor, the command line at the top, the ground at the bottom."""
    imports = room_imports()
    level = floors(imports)
    top = max(level.values())
    canvas = Canvas(ROW * (top + 1) + 76, theme, "The rooms of hf_familial and their imports")
    places: dict[str, tuple[float, float, float]] = {}
    for floor in range(top + 1):
        rooms = [room for room in ROOMS if level[room] == floor]
        width = min(150, (WIDTH - 2 * GAP) / len(rooms) - GAP)
        left = (WIDTH - len(rooms) * (width + GAP) + GAP) / 2
        for i, room in enumerate(rooms):
            places[room] = (left + i * (width + GAP), 12 + (top - floor) * ROW, width)
    for room, below in direct(imports):
        (x, y, w), (bx, by, bw) = places[room], places[below]
        canvas.path([(x + w / 2, y + BOX), (bx + bw / 2, by - 2)], "muted", 1.2, arrow=True)
    for room, (x, y, w) in places.items():
        ink = "c3" if room == ISLAND else "c0" if room == "models" else "line"
        canvas.box(x, y, w, BOX, "paper", "", ink)
        canvas.text(x + w / 2, y + 19, room, 15, "ink", "middle", bold=True)
        canvas.text(x + w / 2, y + 36, ROOMS[room], 12, "muted", "middle")
    y = 12 + (top + 1) * ROW - 8
    canvas.box(GAP, y, WIDTH - 2 * GAP, 46, "plain")
    canvas.text(WIDTH / 2, y + 19, "ground", 15, "ink", "middle", bold=True)
    canvas.text(WIDTH / 2, y + 36, ", ".join(GROUND), 12, "muted", "middle")
    return canvas


def main() -> int:
    check = wants_check(__doc__ or "")
    return max(
        keep(FOLDER / f"house-{theme}.svg", house(theme).svg(), Path(__file__).name, theme, check)
        for theme in THEMES
    )


if __name__ == "__main__":
    sys.exit(main())
