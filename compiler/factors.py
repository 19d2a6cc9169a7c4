"""Low-rank factors of a model's linear maps."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from stepgraph.fingerprint import refuse_other_model


@dataclass(frozen=True, eq=False)
class Factors:
    model: str
    fingerprint: str
    dtype: str
    method: str
    arguments: Mapping[str, Any]
    maps: Mapping[str, tuple[Tensor, Tensor]]
    affine: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        found = hashlib.sha256(self.method.encode())
        for name, (a, b) in sorted(self.maps.items()):
            found.update(name.encode() + a.numpy().tobytes() + b.numpy().tobytes())
        for name, t in sorted(self.affine.items()):
            found.update(name.encode() + t.numpy().tobytes())
        return found.hexdigest()[:16]

    def refuse_other(self, model: nn.Module) -> None:
        refuse_other_model(self, model)
