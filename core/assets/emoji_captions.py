"""What flux-emoji draws on, and what its pictures are called."""

# RGB in 0..1.
BACKGROUNDS = {
    "mint": (0.74, 0.95, 0.83), "sky": (0.72, 0.88, 0.98), "rose": (0.98, 0.78, 0.84), "lemon": (0.99, 0.96, 0.70),
    "lilac": (0.86, 0.80, 0.97), "peach": (0.99, 0.85, 0.72), "snow": (0.97, 0.97, 0.97), "slate": (0.45, 0.50, 0.58),
}  # fmt: skip


def caption(name: str, background: str) -> str:
    """The words of an icon's name, and its background: "pizza on mint"."""
    return f"{name.replace('-', ' ')} on {background}"
