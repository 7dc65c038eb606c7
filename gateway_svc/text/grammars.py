"""From the forms that clients ask for to grammars, as llguidance writes them, checked at once.

A grammar is a string. It travels with its request to the worker that draws the tokens; what the tokens stand
for travels once, as a `Vocabulary`. Neither needs to be understood on the way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from gateway_svc.errors import InvalidField

MAX_GRAMMAR_BYTES = 1 << 20
MAX_CHOICES = 10_000


def json_schema_grammar(schema: dict[str, Any] | bool | str, field: str = "json_schema") -> str:
    """The grammar of JSON that a schema admits, given as such or as its JSON.

    Raises:
        InvalidField: it is no schema, cannot be satisfied, or uses what cannot be guaranteed (`not`, ...).
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidField(field, f"is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise InvalidField(field, f"is a JSON {type(schema).__name__}; a schema is an object")
    try:
        text = json.dumps(schema, ensure_ascii=False)
        return checked(LLMatcher.grammar_from_json_schema(text), field)
    except (ValueError, RecursionError) as error:
        raise InvalidField(field, str(error)) from error


def json_object_grammar(field: str = "json_object") -> str:
    """The grammar of any JSON object."""
    return json_schema_grammar({"type": "object"}, field)


def regex_grammar(pattern: str, field: str = "regex") -> str:
    """The grammar of a whole match. Raises InvalidField: the expression is not one, or looks around."""
    return checked(LLMatcher.grammar_from_regex(pattern), field)


def choice_grammar(texts: Sequence[str], field: str = "choice") -> str:
    """The grammar of one of these texts. Raises InvalidField: there are none, or too many."""
    if not texts or len(texts) > MAX_CHOICES:
        raise InvalidField(field, f"has {len(texts)} texts; from 1 to {MAX_CHOICES} are taken")
    options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return lark_grammar(f"start: {options}", field)


def lark_grammar(text: str, field: str = "grammar") -> str:
    """The grammar that a text in Lark's form describes (llguidance's dialect), or one in llama.cpp's GBNF.

    Raises:
        InvalidField: it is neither.
    """
    try:
        text = any_to_lark(text)
    except Exception as error:  # the converter raises plain Exception for a bad line
        raise InvalidField(field, f"is neither in Lark's form nor in GBNF: {error}") from error
    return checked(LLMatcher.grammar_from_lark(text), field)


def checked(grammar: str, field: str) -> str:
    """The grammar itself. Raises InvalidField: it is too long, or is not one."""
    if len(grammar.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
        raise InvalidField(field, f"makes a grammar of more than {MAX_GRAMMAR_BYTES} bytes")
    if problem := LLMatcher.validate_grammar(grammar):
        raise InvalidField(field, problem.strip())
    return grammar
