"""Low-rank factors of a model's linear maps, and their file."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stepgraph.checked import check_fields, checked
from stepgraph.checks import check_number, is_finite
from stepgraph.errors import ArgumentError, FileFormatError, MismatchError, PlanError
from stepgraph.files.tensor_record import parse_tensor_record, read_tensor_record, write_tensor_record
from stepgraph.fingerprint import dtype_name, fingerprint, model_dtype, tensor_digest
from stepgraph.plan.header import DTYPES

FORMAT = "stepgraph-factors"
VERSION = 1
METHODS = ("svd", "ca", "cd", "cov", "whole")
# Factors without a map, of coefficients per channel alone.
AFFINE = "affine"
# Factors of several methods, merged.
MIXED = "mixed"
REMEDY = "make factors with `stepgraph factors make`"

# Within the class `bytes` is a property.
Contents: TypeAlias = bytes


@dataclass(frozen=True, eq=False)
class Factors:
    """A [C_out, r] and B [r, C_in] of linear maps: A B (x - stored x) is what a map's stored output lacks.

    Attributes:
        model: Class name of the model.
        fingerprint: Of the model (`stepgraph.fingerprint`).
        dtype: Of the model's weights; the factors themselves are float32.
        method: One of `METHODS`, or `AFFINE` or `MIXED`.
        arguments: What made them, as JSON keeps it.
        maps: Module path of an nn.Linear -> (A, B). With the method "whole" the path of a site's module: one map from the
            change of its input to that of its output.
        affine: "<site name>/<step>" -> [2, C] float32, scale and shift per channel; empty unless fitted.
        errors: Per map, where known: sqrt(E||(W - A B) dx||^2 / E||W dx||^2) over the increments it was made from; of whole
            maps sqrt(E||dy - A B dx||^2 / E||dy||^2).
        facts: What the forward read (`PlanHeader.facts`) when what they were made from was measured; empty where nothing was,
            or the file does not say.

    Raises:
        PlanError: On construction, when a tensor's shape, dtype or contents are wrong.
    """

    model: str
    fingerprint: str
    dtype: str
    method: str
    arguments: Mapping[str, Any]
    maps: Mapping[str, tuple[Tensor, Tensor]]
    affine: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "the factors' ")
        if self.method not in (*METHODS, AFFINE, MIXED):
            raise PlanError(f"unknown method {self.method!r} of factors; known: {', '.join((*METHODS, AFFINE, MIXED))}")
        if self.dtype not in DTYPES:
            raise PlanError(f"factors of a model of dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        for path, (a, b) in self.maps.items():
            _check_map(path, a, b)
        for name, table in self.affine.items():
            if table.ndim != 2 or table.shape[0] != 2 or table.dtype != torch.float32 or not is_finite(table):
                raise PlanError(f"affine {name} is {_shown(table)}; expected finite float32 values [2, C]")
        unknown = sorted(set(self.errors) - set(self.maps))
        if unknown:
            raise PlanError(f"an error is given for {unknown[0]!r}, which has no map")
        for path, error in self.errors.items():
            check_number(f"the error of {path!r}", error, what="a finite number")

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every map."""
        return {path: b.shape[0] for path, (_, b) in self.maps.items()}

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        tensors = [*(t for pair in self.maps.values() for t in pair), *self.affine.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the model, the method, the facts and all tensors."""
        sha = hashlib.sha256(f"{self.model} {self.fingerprint} {self.dtype} {self.method}".encode())
        for name, tensor in sorted(self._tensors().items()):
            sha.update(f"{name} {tuple(tensor.shape)}".encode() + tensor_digest(tensor))
        if self.facts:
            sha.update(json.dumps(dict(self.facts), sort_keys=True).encode())
        return sha.hexdigest()[:16]

    @checked
    def with_affine(self, affine: Mapping[str, Tensor]) -> "Factors":
        """The same maps with other per-channel corrections."""
        return replace(self, affine=dict(affine))

    @checked
    def merge(self, other: "Factors") -> "Factors":
        """These and other maps of the same model and kind (linear or whole) together; which comes first makes no difference.

        The method is that of the factors that have maps, `MIXED` where those are of two.

        Raises:
            PlanError: They are of different models or kinds, or both have a map of one module.
        """
        for name in ("model", "fingerprint", "dtype"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise MismatchError(f"factors of different models cannot be merged: {name} is {ours} and {theirs}")
        methods = {factors.method for factors in (self, other) if factors.maps} or {AFFINE}
        if "whole" in methods and len(methods) > 1:
            raise ArgumentError(f"{self.method!r} and {other.method!r} factors cannot be merged: one kind is of whole modules")
        twice = sorted(set(self.maps) & set(other.maps)) + sorted(set(self.affine) & set(other.affine))
        if twice:
            raise ArgumentError(f"both factors have {twice[0]!r}; leave it out of one of them")
        other_facts = [path for path, text in self.facts.items() if other.facts.get(path, text) != text]
        if other_facts:
            path = other_facts[0]
            raise MismatchError(
                f"factors that were measured on different models cannot be merged: {path} was {self.facts[path]!a} and "
                f"{other.facts[path]!a}"
            )
        arguments = {
            "merged": [dict(self.arguments) | {"method": self.method}, dict(other.arguments) | {"method": other.method}]
        }
        return replace(
            self,
            method=methods.pop() if len(methods) == 1 else MIXED,
            arguments=arguments,
            maps={**self.maps, **other.maps},
            affine={**self.affine, **other.affine},
            errors={**self.errors, **other.errors},
            facts={**self.facts, **other.facts},
        )

    @checked
    def refuse_other(self, model: nn.Module) -> None:
        """Compare a model with the one the factors were made of.

        Raises:
            PlanError: Class, dtype, structure or weights differ, or a map is of a module that it does not fit.
        """
        refuse_model("the factors are", (self.model, self.fingerprint, self.dtype), model)
        modules = dict(model.named_modules())
        for path, (a, b) in self.maps.items():
            module = modules.get(path)
            if module is None:
                raise MismatchError(f"the factors have a map of {path!r}, which this model does not have")
            # A map across a whole module is compared with its site when a plan is compiled.
            if isinstance(module, nn.Linear) and (module.out_features, module.in_features) != (a.shape[0], b.shape[1]):
                raise MismatchError(
                    f"the factors of {path!r} are for a map [{a.shape[0]}, {b.shape[1]}]; this model's is "
                    f"[{module.out_features}, {module.in_features}]"
                )

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata is the rest as JSON; it appears whole or not at all."""
        names = ("model", "fingerprint", "dtype", "method", "arguments", "errors", "facts")
        described = {name: getattr(self, name) for name in names}
        write_tensor_record(
            path, FORMAT, VERSION, described | {"maps": list(self.maps), "digest": self.digest}, self._tensors()
        )

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "Factors":
        """Read a file written by `save`.

        Raises:
            PlanError: The file is missing, cut short, of another format or version, holds tensors that are not valid, or others
                than were saved.
        """
        return cls._of_record(*read_tensor_record(path, FORMAT, VERSION, REMEDY), path)

    @classmethod
    @checked
    def parse(cls, data: Contents, where: str) -> "Factors":
        """As `load`, of a file's contents; `where` is what errors call it."""
        return cls._of_record(*parse_tensor_record(data, where, FORMAT, VERSION), where)

    @classmethod
    def _of_record(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | Path) -> "Factors":
        # Older files do not say what was read.
        described = {"facts": {}, **described}
        for what, kind in (("maps", list), ("arguments", dict), ("errors", dict), ("facts", dict)):
            if not isinstance(described.get(what), kind):
                actual = f"{what} is {type(described.get(what)).__name__}"
                raise FileFormatError(f"{path}: in its metadata {actual}; expected a {kind.__name__}; {REMEDY}")
        names, arguments, errors = described["maps"], described["arguments"], described["errors"]
        texts = [described.get(name) for name in ("model", "fingerprint", "dtype", "method")]
        if not all(isinstance(text, str) for text in (*texts, *names)):
            raise FileFormatError(
                f"{path}: model, fingerprint, dtype, method and maps are {texts} and {names[:4]}; expected texts"
            )
        missing = [key for name in names for key in _keys(name) if key not in tensors]
        if missing:
            raise FileFormatError(f"{path}: the tensor {missing[0]!r} is missing")
        maps = {name: (tensors[_keys(name)[0]], tensors[_keys(name)[1]]) for name in names}
        affine = {key.removeprefix("affine/"): t for key, t in tensors.items() if key.startswith("affine/")}
        try:
            model, model_fingerprint, dtype, method = map(str, texts)
            read = cls(model, model_fingerprint, dtype, method, arguments, maps, affine, errors, described["facts"])
        except PlanError as error:
            raise FileFormatError(f"{path}: {error}") from error
        if described.get("digest") != read.digest:
            raise FileFormatError(
                f"{path}: its contents have the digest {read.digest}, its metadata says {described.get('digest')!r}; the file "
                f"is damaged or was changed: {REMEDY}"
            )
        return read

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in the file."""
        pairs = {key: t for path, pair in self.maps.items() for key, t in zip(_keys(path), pair, strict=True)}
        return pairs | {f"affine/{name}": table for name, table in self.affine.items()}


def refuse_model(whose: str, expected: tuple[str, str, str], model: nn.Module) -> None:
    """Compare a model with (class, fingerprint, dtype) of the one that something was made of.

    Raises:
        PlanError: They differ; the message says both sides, and begins with `whose`, such as "the factors are".
    """
    name, print_, dtype = expected
    if type(model).__name__ != name:
        raise MismatchError(f"{whose} of a {name}; this model is a {type(model).__name__}")
    model_dtype_name = dtype_name(model_dtype(model))
    if model_dtype_name != dtype:
        raise MismatchError(f"{whose} of a {dtype} model; this one is {model_dtype_name}; convert the model or make them anew")
    stated, actual = print_.split("/"), fingerprint(model, print_).split("/")
    if stated[0] != actual[0]:
        raise MismatchError(
            f"{whose} of another {name}: its configuration or parameter shapes have the hash {stated[0]}, this model's "
            f"{actual[0]}"
        )
    if stated[-1] != actual[-1] and "-" not in (stated[-1], actual[-1]):
        raise MismatchError(
            f"{whose} of other weights of {name} (hash {stated[-1]}, this model's {actual[-1]}); make them anew"
        )


def place_of(path: str) -> str:
    """A module path without its numbers: "transformer_blocks.*.attn1.to_q" for that map of every block."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON keeps them, so that what is read back is equal."""
    plain: dict[str, Any] = json.loads(json.dumps(arguments, default=str))
    return plain


def _keys(path: str) -> tuple[str, str]:
    return f"maps/{path}/a", f"maps/{path}/b"


def _check_map(path: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not a.shape[1]:
        raise PlanError(f"the factors of {path!r} are {_shown(a)} and {_shown(b)}; expected [C_out, r] and [r, C_in], r >= 1")
    if a.shape[1] > min(a.shape[0], b.shape[1]):
        raise PlanError(
            f"the factors of {path!r} have rank {a.shape[1]}, more than the map [{a.shape[0]}, {b.shape[1]}] can have"
        )
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise PlanError(f"the factors of {path!r} are {_shown(a)} and {_shown(b)}; expected float32")
    if not (is_finite(a) and is_finite(b)):
        raise PlanError(f"the factors of {path!r} hold NaN or infinite values, or none")


def _shown(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
