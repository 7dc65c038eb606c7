"""Random JSON schemas that a grammar can guarantee: seeded, so that a number names a schema for ever.

They use every keyword that docs/structured.md lists. Most strings and arrays are bounded, so that most
outputs of a small model end before their last token.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

NAMES = (
    "id", "name", "title", "price", "tags", "created_at", "is_open", "address", "city", "Größe", "名前",
    'a "quoted" name', "with\\backslash", "x-y.z", "count", "items", "next", "kind", "notes", "scores",
)  # fmt: skip
FORMATS = ("date-time", "date", "time", "email", "ipv4", "uuid", "hostname", "duration")
PATTERNS = (
    r"^[A-Z]{2}-[0-9]{3}$",
    r"^(north|south|east|west)$",
    r"^[a-z]+(-[a-z]+){0,2}$",
    r"^\+?[0-9]{3,9}$",
    r"^#[0-9a-fA-F]{6}$",
)
VALUES: tuple[Any, ...] = (
    "red", "green", "deep blue", "", "a\"b\\c\n", "été", "日本",
    0, -7, 42, 3.5, True, False, None, [1, 2], {"a": 1},
)  # fmt: skip
MAX_DEPTH = 3


def schema(number: int) -> Schema:
    """The schema of this number; the same one whenever it is asked for."""
    made = _Maker(random.Random(f"pagoda schema {number}"))
    top = made.object(0) if made.random.random() < 0.8 else made.any(0)
    if made.definitions:
        top = {**top, "$defs": made.definitions}
    return top


class _Maker:
    """Draws one schema; `definitions` are what its references name."""

    def __init__(self, generator: random.Random) -> None:
        self.random = generator
        self.definitions: dict[str, Schema] = {}

    def any(self, depth: int) -> Schema:
        """A schema of any kind; nested ones while there is depth left."""
        flat = [self.string, self.integer, self.number, self.choice, self.simple]
        nested = [self.object, self.array, self.tuple, self.union, self.reference, self.map, self.both]
        kinds = flat if depth >= MAX_DEPTH else flat + nested
        return self.random.choice(kinds)(depth + 1)

    def object(self, depth: int) -> Schema:
        """Named properties, some of them required, mostly nothing else."""
        names = self.random.sample(NAMES, self.random.randint(1, 4))
        made: Schema = {
            "type": "object",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if self.random.random() < 0.7],
            "additionalProperties": False,
        }
        if self.random.random() < 0.1:
            made["additionalProperties"] = self.simple(depth)
        if self.random.random() < 0.2:
            made |= {"title": "Something", "description": "What it is."}
        return made

    def map(self, depth: int) -> Schema:
        """Names that nobody knows ahead."""
        if self.random.random() < 0.5:
            values = {"patternProperties": {"^k_[a-z]{1,4}$": self.any(depth)}, "additionalProperties": False}
            return {"type": "object", **values}
        return {"type": "object", "additionalProperties": self.integer(depth), "maxProperties": 3}

    def array(self, depth: int) -> Schema:
        """Items of one kind."""
        least = self.random.randint(0, 2)
        return {
            "type": "array",
            "items": self.any(depth),
            "minItems": least,
            "maxItems": least + self.random.randint(0, 3),
        }

    def tuple(self, depth: int) -> Schema:
        """Items of different kinds."""
        parts = [self.any(depth) for _ in range(self.random.randint(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def union(self, depth: int) -> Schema:
        """One of several, by anyOf or, where they are disjoint, by oneOf."""
        if self.random.random() < 0.5:
            return {"anyOf": [self.any(depth) for _ in range(self.random.randint(2, 3))]}
        return {"oneOf": [self.string(depth), self.integer(depth), {"type": "null"}]}

    def both(self, depth: int) -> Schema:
        """Two schemas at once."""
        low = self.random.randint(-50, 50)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 30}]}

    def reference(self, depth: int) -> Schema:
        """A schema by its name; one of them holds itself."""
        name = self.random.choice(["leaf", "tree"])
        if name not in self.definitions:
            self.definitions[name] = {}
            tree: Schema = {
                "type": "object",
                "properties": {
                    "value": self.simple(depth),
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
            self.definitions[name] = tree if name == "tree" else self.string(depth)
        return {"$ref": f"#/$defs/{name}"}

    def string(self, depth: int) -> Schema:
        """By length, by pattern or by format."""
        kind = self.random.random()
        if kind < 0.2:
            return {"type": "string", "pattern": self.random.choice(PATTERNS)}
        if kind < 0.45:
            return {"type": "string", "format": self.random.choice(FORMATS)}
        least = self.random.randint(0, 5)
        made: Schema = {"type": "string", "minLength": least, "maxLength": least + self.random.randint(0, 25)}
        if kind > 0.95:
            del made["maxLength"]
        return made

    def integer(self, depth: int) -> Schema:
        """Within bounds, or a multiple."""
        low = self.random.randint(-1000, 1000)
        made: Schema = {"type": "integer"}
        if self.random.random() < 0.4:
            made |= {"minimum": low}
        if self.random.random() < 0.4:
            made |= {"exclusiveMaximum": low + self.random.randint(2, 500)}
        if len(made) == 1 and self.random.random() < 0.5:
            made["multipleOf"] = self.random.choice([2, 5, 10, 25])
        return made

    def number(self, depth: int) -> Schema:
        """Within bounds."""
        low = round(self.random.uniform(-10, 10), 2)
        made: Schema = {"type": "number", "minimum": low}
        if self.random.random() < 0.7:
            made["maximum"] = round(low + self.random.uniform(0.5, 100), 2)
        return made

    def choice(self, depth: int) -> Schema:
        """One of some values."""
        if self.random.random() < 0.3:
            return {"const": self.random.choice(VALUES)}
        return {"enum": self.random.sample(VALUES, self.random.randint(2, 5))}

    def simple(self, depth: int) -> Schema:
        """A boolean, nothing, or one of two types."""
        return self.random.choice(
            [
                {"type": "boolean"},
                {"type": ["boolean", "null"]},
                {"type": ["integer", "null"], "minimum": 0},
                {"type": "string", "maxLength": 12},
            ]
        )
