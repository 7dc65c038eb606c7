"""From what clients ask for to grammars, and the vocabulary on its way to the scheduler."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gateway_svc.errors import InvalidField
from gateway_svc.server import GatewayServer
from gateway_svc.text import grammars
from gateway_svc.text.grammars import ModelGrammars
from pagoda.v1 import inference_pb2
from pagoda.v1 import scheduler_pb2 as pb
from tests.support.grammars import Judge
from tests.unit.gateway.conftest import ids_of, model_tokenizer, until
from tests.unit.gateway.fake_scheduler import FakeScheduler

MODEL = pb.ModelInfo(vocab_size=49152, eos_token_ids=[0, 2])
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model_grammars() -> ModelGrammars:
    return ModelGrammars(model_tokenizer())


@pytest.fixture(scope="module")
def judge(model_grammars: ModelGrammars) -> Judge:
    return Judge(model_grammars.compile(lambda: grammars.json_object_grammar(), "", MODEL)[1])


def takes(judge: Judge, grammar: str, text: str) -> bool:
    """Whether a text is a whole output of the grammar."""
    try:
        judge.assert_follows(grammar, [*ids_of(text), 2], ended=True)
    except AssertionError:
        return False
    return True


COMPACT: dict[str, Any] = {"whitespace_flexible": False}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (grammars.json_schema_grammar(SCHEMA), ['{"a": 1}', '{\n "a":-2, "b": null}'], ["{}", '{"a": 1.5}']),
        (grammars.json_schema_grammar(json.dumps(SCHEMA)), ['{"a":1}'], [' {"a":1}', '{"a":1} ']),
        (grammars.json_schema_grammar(True), ["5", '"x"', "[]"], ["x"]),
        (grammars.json_object_grammar(), ["{}", '{"x": [1, {"y": "é"}]}'], ["[]", "{"]),
        (grammars.json_object_grammar(**COMPACT, whitespace_pattern=None), ['{"a":1}'], ['{"a": 1}']),
        (grammars.json_schema_grammar({**SCHEMA, "x-guidance": COMPACT}), ['{"a":1}'], ['{"a": 1}']),
        (grammars.regex_grammar("a/b[0-9]{2}|日本"), ["a/b12", "日本"], ["a/b1", "日", "xa/b12"]),
        (grammars.choice_grammar(["y", 'a "quote"\n', "n\\o"]), ["y", 'a "quote"\n', "n\\o"], ["ye", "no"]),
        (grammars.lark_grammar('start: "a" b\nb: /[0-9]+/ | "x"'), ["a12", "ax"], ["a", "b1"]),
        (grammars.lark_grammar('root ::= "a" [0-9]+'), ["a12"], ["a", "1"]),
    ],
)  # fmt: skip
def test_what_a_grammar_takes(judge: Judge, grammar: str, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not takes(judge, grammar, text)] == []
    assert [text for text in bad if takes(judge, grammar, text)] == []


def test_whitespace_in_json_is_bounded(judge: Judge) -> None:
    grammar = grammars.json_object_grammar()
    assert takes(judge, grammar, "{\n" + 20 * " " + '"a": 1}')
    assert not takes(judge, grammar, "{" + 40 * "\n" + '"a": 1}')


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: grammars.json_schema_grammar("{", "f"), "is not JSON"),
        (lambda: grammars.json_schema_grammar("[1]", "f"), "a schema is an object"),
        (lambda: grammars.json_schema_grammar('{"const": "\\ud800"}', "f"), "surrogates"),
        (lambda: grammars.json_schema_grammar({"type": "text"}, "f"), "Invalid type: text"),
        (lambda: grammars.json_schema_grammar({"$ref": "#/$defs/x"}, "f"), "does not exist"),
        (lambda: grammars.json_schema_grammar({"enum": []}, "f"), "Unsatisfiable"),
        (lambda: grammars.json_schema_grammar({"not": {}}, "f"), "Unimplemented"),
        (lambda: grammars.json_schema_grammar({"enum": ["x" * (1 << 20)]}, "f"), "more than 1048576 bytes"),
        (lambda: grammars.json_object_grammar("f", whitespace_pattern="("), "regex"),
        (lambda: grammars.regex_grammar("(?=a)b", "f"), "look-around"),
        (lambda: grammars.choice_grammar([], "f"), "has 0 texts"),
        (lambda: grammars.choice_grammar(["x"] * 10_001, "f"), "has 10001 texts"),
        (lambda: grammars.lark_grammar("start: nothing", "f"), "1(8): unknown name"),
        (lambda: grammars.lark_grammar("root ::= (", "f"), "neither in Lark's form nor in GBNF"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(model_grammars: ModelGrammars, make: Any, told: str) -> None:
    with pytest.raises(InvalidField) as refused:
        model_grammars.compile(make, "f", MODEL)
    assert refused.value.field == "f" and told in refused.value.problem


def test_a_special_token_that_the_model_lacks(model_grammars: ModelGrammars) -> None:
    """Only compiling finds it."""
    good = grammars.lark_grammar("start: /a/ <|im_start|>")
    assert model_grammars.compile(lambda: good, "f", MODEL)[0] == good
    with pytest.raises(InvalidField, match="unknown special token"):
        model_grammars.compile(lambda: grammars.lark_grammar("start: <|no_such_token|>"), "f", MODEL)


def test_the_vocabulary(model_grammars: ModelGrammars) -> None:
    _, vocabulary = model_grammars.compile(lambda: grammars.json_object_grammar(), "f", MODEL)
    assert len(vocabulary.tokens) == 49152
    assert vocabulary.eos_token_id == 2, "the tokenizer's, for it is one of the model's"
    assert {0, 1, 2} <= set(vocabulary.special_token_ids)
    assert vocabulary.tokens[2] == b"<|im_end|>" and vocabulary.tokens[ids_of(" the")[0]] == b" the"
    larger = pb.ModelInfo(vocab_size=49160, eos_token_ids=[0])
    _, padded = model_grammars.compile(lambda: grammars.json_object_grammar(), "f", larger)
    assert len(padded.tokens) == 49160 and padded.tokens[-1] == b"" and padded.eos_token_id == 0


def test_a_model_without_an_end_cannot_follow_a_grammar(model_grammars: ModelGrammars) -> None:
    with pytest.raises(InvalidField, match="end-of-sequence"):
        model_grammars.compile(lambda: grammars.json_object_grammar(), "f", pb.ModelInfo(vocab_size=49152))


# ------------------------------------------------------------------------------------- on their way


def body(**form: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "structured_outputs": form}


async def test_the_vocabulary_goes_before_the_first_grammar_of_a_session(
    http: Any, server: GatewayServer, fake: FakeScheduler
) -> None:
    plain = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await http.post(CHAT, json=plain)).status_code == 200
    assert not fake.messages["vocabulary"] and not fake.submitted[-1].sampling.grammar
    for _ in range(2):
        assert (await http.post(CHAT, json=body(regex="[a-z]+"))).status_code == 200
        assert "start: /[a-z]+/" in fake.submitted[-1].sampling.grammar
    assert fake.messages["vocabulary"] == 1
    await fake.stop()
    await until(lambda: not server.gateway.link.connected)
    await fake.start()
    await until(lambda: server.gateway.ready)
    assert (await http.post(CHAT, json=plain)).status_code == 200
    assert fake.messages["vocabulary"] == 1
    assert (await http.post(CHAT, json=body(regex="[a-z]+"))).status_code == 200
    assert fake.messages["vocabulary"] == 2


async def test_every_form_of_the_rpc(stub: Any, fake: FakeScheduler) -> None:
    forms = {
        "json_object": (inference_pb2.StructuredOutput(json_object=True), "%json"),
        "json_schema": (inference_pb2.StructuredOutput(json_schema='{"type": "null"}'), '"null"'),
        "regex": (inference_pb2.StructuredOutput(regex="x+"), "/x+/"),
        "choice": (inference_pb2.StructuredOutput(choice={"texts": ["a", "b"]}), '"a" | "b"'),
        "grammar": (inference_pb2.StructuredOutput(grammar='start: "x"'), 'start: "x"'),
    }  # fmt: skip
    for form, contains in forms.values():
        request = inference_pb2.GenerateRequest(text="x", structured_output=form)
        assert [response async for response in stub.Generate(request)]
        assert contains in fake.submitted[-1].sampling.grammar
    given = inference_pb2.GenerateRequest(text="x", sampling=pb.SamplingParams(grammar="start: /y/"))
    assert [response async for response in stub.Generate(given)]
    assert fake.submitted[-1].sampling.grammar == "start: /y/"
    assert fake.messages["vocabulary"] == 1


async def test_the_rpc_refuses_two_forms(stub: Any) -> None:
    request = inference_pb2.GenerateRequest(
        text="x",
        sampling=pb.SamplingParams(grammar="start: /y/"),
        structured_output=inference_pb2.StructuredOutput(regex="x"),
    )
    with pytest.raises(Exception, match=re.escape("structured_output.regex: cannot be together")):
        [response async for response in stub.Generate(request)]
