"""TaylorSeer as its code does it: factors that are updated whenever a value is stored."""

import math


class TaylorSeer:
    """Difference factors of one value."""

    def __init__(self, order: int) -> None:
        self.order, self.factors, self.time = order, [], None

    def store(self, value, time: float) -> None:
        new = [value]
        for old in self.factors[: self.order]:
            new.append((new[-1] - old) / (time - self.time))
        self.factors, self.time = new, time

    def predict(self, now: float):
        x = now - self.time
        return sum(x**j / math.factorial(j) * factor for j, factor in enumerate(self.factors))
