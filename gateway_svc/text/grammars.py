"""From the forms that clients ask for to grammars, as llguidance writes them, and what its tokens stand for.

A grammar is a string. It travels with its request to the worker that draws the tokens; what the tokens stand
for travels once, as a `Vocabulary`. Neither needs to be understood on the way. Everything is compiled here
first, exactly as the worker does it, so that what is wrong is said before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from gateway_svc.errors import InvalidField
from gateway_svc.text.tokenizer import ModelTokenizer
from pagoda.v1 import scheduler_pb2 as pb

MAX_GRAMMAR_BYTES = 1 << 20
MAX_CHOICES = 10_000
NUM_COMPILED = 256  # grammars whose check is remembered
# Between two parts of JSON. Unbounded, a model can go on with line breaks until its last token.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
# Where the grammar leaves one way to go on, llguidance would choose the tokens, as the tokenizer would. Only
# the model knows how they go on from what it has written, and a worker has no tokenizer.
FREE_TOKENS = '%llguidance {"no_forcing": true}\n'


def json_schema_grammar(
    schema: dict[str, Any] | bool | str, field: str = "json_schema", **options: Any
) -> str:
    """The grammar of JSON that a schema admits, given as such or as its JSON.

    `options` are llguidance's (`whitespace_pattern`, ...); the schema's own under "x-guidance" come first.

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
    if isinstance(schema, dict):
        own = schema.get("x-guidance")
        own = own if isinstance(own, dict) else {}
        if not own.keys() & {"whitespace_pattern", "whitespace_flexible"}:
            options.setdefault("whitespace_pattern", WHITESPACE)
        schema = {**schema, "x-guidance": options | own}
    try:
        text = json.dumps(schema, ensure_ascii=False)
        text.encode()  # which lone surrogates are refused by
        checked(LLMatcher.grammar_from_json_schema(text), field)
    except (ValueError, RecursionError) as error:
        raise InvalidField(field, str(error)) from error
    return checked(f"{FREE_TOKENS}start: %json {text}", field)


def json_object_grammar(field: str = "json_object", **options: Any) -> str:
    """The grammar of any JSON object."""
    return json_schema_grammar({"type": "object"}, field, **options)


def regex_grammar(pattern: str, field: str = "regex") -> str:
    """The grammar of a whole match. Raises InvalidField: the expression is not one, or looks around."""
    checked(LLMatcher.grammar_from_regex(pattern), field)
    return checked(f"{FREE_TOKENS}start: /{regex_to_lark(pattern, '')}/", field)


def choice_grammar(texts: Sequence[str], field: str = "choice") -> str:
    """The grammar of one of these texts. Raises InvalidField: there are none, or too many."""
    if not texts or len(texts) > MAX_CHOICES:
        raise InvalidField(field, f"has {len(texts)} texts; from 1 to {MAX_CHOICES} are taken")
    options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return checked(f"{FREE_TOKENS}start: {options}", field)


def lark_grammar(text: str, field: str = "grammar") -> str:
    """The grammar that a text in Lark's form describes (llguidance's dialect), or one in llama.cpp's GBNF.

    Raises:
        InvalidField: it is neither.
    """
    try:
        text = any_to_lark(text)
    except Exception as error:  # the converter raises plain Exception for a bad line
        raise InvalidField(field, f"is neither in Lark's form nor in GBNF: {error}") from error
    checked(text, field)  # first as it is, for its lines are counted where something is wrong
    return checked(FREE_TOKENS + text, field)


def checked(grammar: str, field: str) -> str:
    """The grammar itself. Raises InvalidField: it is too long, or is not one."""
    if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidField(field, f"makes a grammar of more than {MAX_GRAMMAR_BYTES} bytes")
    if problem := LLMatcher.validate_grammar(grammar):
        raise InvalidField(field, problem.strip())
    return grammar


class ModelGrammars:
    """A model's tokens, as grammars are matched against. What takes long here belongs into a thread."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = lru_cache(1)(self._tokens_of)
        self._problem = lru_cache(NUM_COMPILED)(self._compile)

    def compile(self, make: Callable[[], str], field: str, model: pb.ModelInfo) -> tuple[str, pb.Vocabulary]:
        """What `make` makes, compiled once, and the vocabulary that goes with it.

        Raises:
            InvalidField: no grammar, too complex, or names a special token that the model lacks.
        """
        if not model.eos_token_ids:
            raise InvalidField(field, "needs a model with an end-of-sequence token, and this one has none")
        grammar = make()
        key = (model.vocab_size, *model.eos_token_ids)
        if problem := self._problem(grammar, key):
            raise InvalidField(field, problem)
        return grammar, self._tokens(key).vocabulary

    def _compile(self, grammar: str, key: tuple[int, ...]) -> str:
        matcher = LLMatcher(self._tokens(key).made, grammar, log_level=0)
        matcher.compute_bitmask()
        return matcher.get_error().strip()

    def _tokens_of(self, key: tuple[int, ...]) -> _Tokens:
        vocab_size, *eos = key
        own = self._tokenizer.eos_id
        return _Tokens(
            pb.Vocabulary(
                tokens=[self._tokenizer.verbatim[i] for i in range(vocab_size)],
                special_token_ids=[i for i in self._tokenizer.special_ids if i < vocab_size],
                eos_token_id=own if own in eos else eos[0],
            )
        )


class _Tokens:
    """A vocabulary as `TokenizerWrapper` wants one."""

    bos_token_id = None

    def __init__(self, vocabulary: pb.Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_token_ids
        self.eos_token_id = vocabulary.eos_token_id
        self.made = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: str) -> list[int]:
        return self.made.greedy_tokenize(text)
