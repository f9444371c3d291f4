# /// script
# requires-python = ">=3.10"
# dependencies = ["pillow>=10.1"]
# ///
"""Draw the image of the examples: a notice board of 3072 x 2048 pixels with large shapes and very small print.

    python examples/make_images.py            writes examples/images/harbour_board.png

The same Pillow version gives the same file. Nothing but Pillow and the font inside it is used.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


SIZE = (3072, 2048)
OUTPUT = Path(__file__).parent / "images" / "harbour_board.png"

BOARD, PAPER, INK, MUTED = "#d9c7a3", "#fbf8f0", "#22303c", "#7a8590"
NAVY, RED, TEAL, AMBER, GREEN = "#17375e", "#c8402f", "#1f8a8a", "#e8a33d", "#5b8c4a"

DEPARTURES = [
    ("06:40", "Seal Island", "Pier 2", "on time"),
    ("07:15", "North Lighthouse", "Pier 1", "on time"),
    ("08:05", "Old Town Quay", "Pier 4", "delayed 10 min"),
    ("09:30", "Heron Bay", "Pier 2", "on time"),
    ("11:00", "Seal Island", "Pier 2", "cancelled"),
    ("12:45", "Amber Beach", "Pier 3", "on time"),
    ("14:20", "North Lighthouse", "Pier 1", "on time"),
    ("16:10", "Heron Bay", "Pier 2", "on time"),
]
LINES = {
    RED: [(2010, 1000), (2200, 900), (2420, 900), (2600, 720), (2860, 720)],
    TEAL: [(2010, 620), (2200, 620), (2420, 900), (2420, 1110), (2640, 1110)],
    AMBER: [(2200, 1140), (2200, 900), (2200, 620), (2430, 520), (2860, 520)],
}
STOPS = {
    "Central Quay": (2200, 900, "right below"),
    "Fish Market": (2420, 900, "right below"),
    "Lighthouse": (2600, 720, "left above"),
    "Seal Island": (2860, 720, "below"),
    "Old Town": (2200, 620, "left above"),
    "Shipyard": (2420, 1110, "below"),
    "Amber Beach": (2640, 1110, "below"),
    "Heron Bay": (2860, 520, "below"),
    "Museum": (2430, 520, "above"),
}
LABEL_PLACES = {
    "above": (0, -48, "mm"),
    "below": (0, 50, "mm"),
    "left above": (-24, -44, "rm"),
    "right below": (28, 44, "lm"),
}
SMALL_PRINT = [
    "Lost property is kept at the ticket office for thirty days.",
    "The key of the boat house hangs behind the blue door.",
    "Locker 17 opens with the code 4 0 9 6.",
    "Dogs travel free of charge on the lower deck.",
    "In fog the last ferry leaves one hour early.",
]


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow, at a height in pixels."""
    return ImageFont.load_default(size)


def paper(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, colour: str) -> None:
    """One sheet with a coloured head and a pin."""
    left, top, right, bottom = box
    draw.rectangle((left + 14, top + 14, right + 14, bottom + 14), fill="#b7a583")
    draw.rectangle(box, fill=PAPER)
    draw.rectangle((left, top, right, top + 96), fill=colour)
    draw.text((left + 36, top + 48), title, font=font(56), fill="white", anchor="lm")
    draw.ellipse((right - 70, top + 28, right - 30, top + 68), fill=AMBER, outline="white", width=5)


def draw_departures(draw: ImageDraw.ImageDraw) -> None:
    """The timetable at the upper left."""
    paper(draw, (90, 330, 1830, 1230), "Departures", NAVY)
    for row, (time, place, pier, state) in enumerate(DEPARTURES):
        y = 490 + row * 92
        if row % 2:
            draw.rectangle((90, y - 44, 1830, y + 48), fill="#efe9da")
        colour = {"on time": GREEN, "cancelled": RED}.get(state, AMBER)
        draw.text((140, y), time, font=font(62), fill=INK, anchor="lm")
        draw.text((400, y), place, font=font(58), fill=INK, anchor="lm")
        draw.text((1010, y), pier, font=font(54), fill=MUTED, anchor="lm")
        draw.rounded_rectangle((1290, y - 32, 1780, y + 34), radius=30, fill=colour)
        draw.text((1535, y), state, font=font(42), fill="white", anchor="mm")


def draw_map(draw: ImageDraw.ImageDraw) -> None:
    """The map of the ferry lines at the upper right."""
    paper(draw, (1920, 330, 2982, 1230), "Ferry lines", TEAL)
    draw.polygon([(2500, 430), (2980, 430), (2980, 700), (2760, 620), (2620, 560)], fill="#cfe5e8")
    draw.polygon([(2700, 900), (2980, 830), (2980, 1228), (2780, 1228)], fill="#cfe5e8")
    for colour, points in LINES.items():
        draw.line(points, fill=colour, width=20, joint="curve")
    for name, (x, y, place) in STOPS.items():
        right, down, anchor = LABEL_PLACES[place]
        draw.ellipse((x - 22, y - 22, x + 22, y + 22), fill="white", outline=INK, width=8)
        draw.text((x + right, y + down), name, font=font(34), fill=INK, anchor=anchor)


def draw_scene(draw: ImageDraw.ImageDraw) -> None:
    """A drawing of the harbour at the lower left."""
    left, top, right, bottom = 90, 1330, 1330, 1950
    draw.rectangle((left + 14, top + 14, right + 14, bottom + 14), fill="#b7a583")
    draw.rectangle((left, top, right, bottom), fill="#bfe0ee")
    draw.ellipse((1060, 1390, 1220, 1550), fill="#f6c744")
    draw.polygon([(90, 1720), (330, 1500), (560, 1690), (760, 1560), (1010, 1730), (90, 1730)], fill="#7fa27a")
    draw.rectangle((left, 1720, right, bottom), fill="#2f6f95")
    for row in range(5):
        for step in range(9):
            x, y = 140 + step * 126 + 55 * (row % 2), 1760 + row * 38
            draw.arc((x, y, x + 70, y + 26), 180, 360, fill="#8dc0d8", width=6)
    draw.polygon([(560, 1790), (960, 1790), (890, 1880), (630, 1880)], fill=RED)
    draw.line((750, 1490, 750, 1790), fill="#4a3524", width=14)
    draw.polygon([(765, 1510), (765, 1760), (935, 1760)], fill="white")
    draw.polygon([(735, 1560), (735, 1760), (610, 1760)], fill="#f0e2c0")
    draw.rectangle((1180, 1590, 1240, 1740), fill="white")
    draw.rectangle((1180, 1630, 1240, 1670), fill=RED)
    draw.polygon([(1170, 1590), (1250, 1590), (1210, 1545)], fill=NAVY)


def draw_chart(draw: ImageDraw.ImageDraw) -> None:
    """Passengers a month as bars, lower middle."""
    paper(draw, (1440, 1330, 2250, 1950), "Passengers", GREEN)
    for index, (month, value) in enumerate(zip("JFMAMJ", (31, 28, 46, 72, 88, 64), strict=True)):
        x = 1520 + index * 118
        draw.rectangle((x, 1860 - 4 * value, x + 78, 1860), fill=TEAL if value < 80 else RED)
        draw.text((x + 39, 1848 - 4 * value), f"{value}", font=font(36), fill=INK, anchor="ms")
        draw.text((x + 39, 1904), month, font=font(40), fill=MUTED, anchor="mm")
    draw.line((1490, 1862, 2215, 1862), fill=INK, width=6)


def draw_small_print(draw: ImageDraw.ImageDraw) -> None:
    """A small card with lines of 22 pixels height, lower right: lost when the image is shrunk to one view."""
    draw.rectangle((2474, 1474, 2974, 1804), fill="#b7a583")
    draw.rectangle((2460, 1460, 2960, 1790), fill=PAPER, outline=MUTED, width=3)
    draw.text((2490, 1510), "Notice", font=font(44), fill=RED, anchor="lm")
    for row, line in enumerate(SMALL_PRINT):
        draw.text((2490, 1570 + row * 42), line, font=font(18), fill=INK, anchor="lm")


def make_board() -> Image.Image:
    """Draw the whole board."""
    image = Image.new("RGB", SIZE, BOARD)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, *SIZE), outline="#8a6b3d", width=44)
    draw.text((SIZE[0] // 2, 190), "HARBOUR STATION", font=font(190), fill=NAVY, anchor="mm")
    for part in (draw_departures, draw_map, draw_scene, draw_chart, draw_small_print):
        part(draw)
    return image


if __name__ == "__main__":
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    make_board().quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(OUTPUT, optimize=True)
    sys.stdout.write(f"{OUTPUT.name}: {SIZE[0]} x {SIZE[1]} pixels, {OUTPUT.stat().st_size // 1024} KB\n")
