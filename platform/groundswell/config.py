"""Frozen configuration trees: canonical JSON, identity, import-path classes, dotted-path overrides, one-line errors."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator

CLASS_KEY = "class"


class ConfigError(ValueError):
    """A user's mistake, told in one line that names the field and the remedy."""


class Config(BaseModel):
    """A frozen node of the tree. Unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON-compatible values; polymorphic parts carry their import path under "class"."""
        return self.model_dump(mode="json", serialize_as_any=True)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Validate a plain dictionary. Raises ConfigError, which names the first wrong field."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error)) from None

    def canonical_json(self) -> str:
        """One text per meaning: sorted keys, no spaces, shortest float form."""
        return _canonical(self.to_dict())

    @property
    def identity(self) -> str:
        """sha256 of the canonical JSON, in hex."""
        return hash_of(self.to_dict())

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read JSON or YAML (JSON is a subset of YAML 1.2, but not of what PyYAML reads for floats like 1e-4)."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"neither JSON nor YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(values)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None

    def with_overrides(self, overrides: dict[str, Any]) -> Self:
        """A copy with dotted paths replaced, validated as a whole.

        Text values are read as JSON where that is possible ("3e-4", "true", "[1,2]"), else kept as text. "task.class"
        puts another component in place of the task: its own defaults, and what other overrides say of it.
        Raises ConfigError for a path that the schema does not have or a value that it does not take.
        """
        values = self.to_dict()
        parts = {path.removesuffix(f".{CLASS_KEY}") for path in overrides if path.endswith(f".{CLASS_KEY}")}
        for part in parts:
            _check_path(self, part)
            _place(values, part, {CLASS_KEY: overrides[f"{part}.{CLASS_KEY}"]})
        parts |= {path for path, value in overrides.items() if isinstance(value, Component)}
        for path, value in overrides.items():
            if not any(path.startswith(f"{part}.") for part in parts):  # else: the new class checks its fields
                _check_path(self, path)
            _place(values, path, value.to_dict() if isinstance(value, Config) else parse_value(value))
        return type(self).from_dict(values)

    def get(self, path: str) -> Any:
        """The value at a dotted path. Raises ConfigError where there is none."""
        _check_path(self, path)
        value: Any = self
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def has(self, path: str) -> bool:
        """Is there a field at this dotted path?"""
        try:
            _check_path(self, path)
        except ConfigError:
            return False
        return True

    def flatten(self) -> dict[str, Any]:
        """Dotted path -> leaf value (lists are leaves)."""
        leaves: dict[str, Any] = {}

        def visit(prefix: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, child in value.items():
                    visit(f"{prefix}.{key}" if prefix else key, child)
            else:
                leaves[prefix] = value

        visit("", self.to_dict())
        return leaves


class Component(Config):
    """A part that is chosen by class. In JSON it names its class by import path, so nothing needs a registry.

    `packable` lists the fields that may differ between the members of one pack: those that change neither a tensor's
    shape nor the sequence of operations.
    """

    packable: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="plain")
    def _with_class(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {CLASS_KEY: import_path(type(self)), **fields}

    @model_validator(mode="wrap")
    @classmethod
    def _resolve_class(cls, value: Any, handler: Any) -> Any:
        if isinstance(value, dict) and CLASS_KEY in value:
            target = import_component(value[CLASS_KEY], cls)
            fields = {key: child for key, child in value.items() if key != CLASS_KEY}
            return handler(fields) if target is cls else target.model_validate(fields)
        return handler(value)


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_of(values: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a tree, in hex."""
    return hashlib.sha256(_canonical(values).encode()).hexdigest()


def import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def import_component(path: Any, base: type) -> Any:
    """The class at an import path. Raises ValueError (a field error inside validation) if it is not a `base`."""
    module_name, _, class_name = str(path).rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"no class at import path '{path}'; write package.module.ClassName") from None
    if not (isinstance(target, type) and issubclass(target, base)):
        raise ValueError(f"'{path}' is not a {base.__name__}")
    return target


def parse_value(value: Any) -> Any:
    """Command-line text to a JSON value where it is one, else the text itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def suggest(name: str, known: list[str]) -> str:
    """A hint for a misspelt name: the nearest known one, else all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"


def _place(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        values = values[parent]
    values[last] = value


def _check_path(config: Config, path: str) -> None:
    node: Any = config
    walked: list[str] = []
    for part in path.split("."):
        fields = list(type(node).model_fields) if isinstance(node, BaseModel) else []
        if part not in fields:
            where = ".".join(walked) or type(config).__name__.lower()
            hint = suggest(part, fields) if fields else f"'{where}' has no parts"
            raise ConfigError(f"{path}: '{where}' has no field '{part}'; {hint}")
        node = getattr(node, part)
        walked.append(part)


def describe_validation_error(error: ValidationError) -> str:
    """The first problem in one line: dotted path, what is wrong, what to do."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    if first["type"] == "extra_forbidden":
        text = "no such field; check the spelling (--help lists all fields)"
    elif first["type"] == "missing":
        text = "is required"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        word = text.split(maxsplit=1)[0] if text else ""
        if path and word.startswith(f"{path}."):  # the message names the whole path itself
            path = ""
        elif isinstance(first["input"], dict) and word in first["input"]:  # ... or the field within this part
            path, text = (f"{path}.{word}" if path else word), text[len(word) + 1 :]
    else:
        text = f"{first['msg']}, got {first['input']!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{path + ': ' if path else ''}{text}{more}".split())
