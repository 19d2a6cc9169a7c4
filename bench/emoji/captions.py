"""What flux-emoji's pictures are called, on which backgrounds they stand, and which captions are measured on."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from stepgraph.assets.emoji_captions import BACKGROUNDS
from stepgraph.errors import FileFormatError

# No model sees these: the retrieval network is tested on them.
UNSEEN = ((0.80, 0.70, 0.58), (0.64, 0.90, 0.92), (0.95, 0.70, 0.95), (0.62, 0.72, 0.50), (0.83, 0.86, 0.90))
TONES = ("medium-light", "medium-dark", "light", "medium", "dark")
# A mirrored picture is no longer what the name says: sides, turns, writing, digits, hands of clocks and phases of the moon.
SIDED_WORDS = """
    abc aquarius arrow arrows atm back banknote button calendar cancer capricorn circled clef clock clockwise cool copyright
    counterclockwise crescent currency curving dollar dvd eighteen eject end euro exclamation facing fast forward free
    gemini globe hundred id infinity input japan japanese keycap label last latin left leftwards leo letters libra map mark
    medal moon music musical new newspaper next ng oclock ok om on oncoming place play points pound quarter question
    registered reverse right rightwards score scorpio sign slot soon sos thirty tilted timer top track trade up virgo vs
    watch yen zzz
"""
SIDED = frozenset(SIDED_WORDS.split())
CALIBRATION, MEASURING = "calibration", "measuring"
# Of noise, [first, last): no seed is in both.
NOISE_SEEDS = {MEASURING: range(1000), CALIBRATION: range(1000, 2000)}
FOLDER = Path(__file__).parent


def is_base(name: str, names: Collection[str]) -> bool:
    """Whether an icon's name is not that of another one in a skin tone: "police-car-light" is no car."""
    tone = next((tone for tone in TONES if name.endswith(f"-{tone}")), None)
    return tone is None or f"{name.removesuffix(tone)}medium-dark" not in names


def vocabulary(names: Sequence[str]) -> list[str]:
    """All words of all captions of these icons, sorted."""
    return sorted({word for name in names for word in name.split("-")} | {*BACKGROUNDS, "on"})


def longest(names: Sequence[str]) -> int:
    """Words of the longest caption."""
    return max(len(name.split("-")) for name in names) + 2


def may_mirror(name: str) -> bool:
    """Whether a mirrored icon still is what its name says."""
    return not SIDED & set(name.split("-")) and not re.search(r"\d", name)


def distinct_names(count: int | None = None) -> list[str]:
    """The names in `distinct.txt`, from the most distinct on: the first `count`, or all."""
    names = (FOLDER / "distinct.txt").read_text(encoding="utf-8").split()
    if count is not None and not 0 < count <= len(names):
        raise FileFormatError(f"distinct.txt has {len(names)} icons, not {count}")
    return names[:count]


def write_split(halves: Mapping[str, Sequence[str]], path: Path) -> None:
    """Write, of each icon, the backgrounds of its captions for calibration."""
    lines = [f"{name}: {' '.join(backgrounds)}\n" for name, backgrounds in sorted(halves.items())]
    path.write_text("".join(lines), encoding="utf-8")


def captions_of(half: str, names: Sequence[str], path: Path = FOLDER / "split.txt") -> list[tuple[str, str]]:
    """(icon, background) of all captions of these icons in one half, "calibration" or "measuring", icons in turn.

    Raises:
        FileFormatError: The file lacks an icon.
    """
    lines = [line.split(": ") for line in path.read_text(encoding="utf-8").splitlines()]
    calibration = {name: backgrounds.split() for name, backgrounds in lines}
    lacking = [name for name in names if name not in calibration]
    if lacking:
        raise FileFormatError(
            f"{path} lacks {', '.join(lacking[:5])}; `python -m stepgraph.bench.emoji.choose_icons` writes it"
        )
    sides = {name: [b for b in BACKGROUNDS if (b in calibration[name]) == (half == CALIBRATION)] for name in names}
    turns = range(max(map(len, sides.values())))
    return [(name, sides[name][turn]) for turn in turns for name in names if turn < len(sides[name])]
