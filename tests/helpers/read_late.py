"""What a forward imports when it runs."""

LATE = 0.5


def late(x):
    return x + LATE
