"""An answer's calls of tools, as OpenAI writes them."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence

from gateway_svc.generation import Sample
from gateway_svc.openai import replies
from gateway_svc.text.tools.events import Arguments, CallBegun, Content, Ending, Event
from gateway_svc.text.tools.formats import ToolFormat
from gateway_svc.text.tools.parser import ToolCallParser

_ID_LETTERS = string.ascii_letters + string.digits


class ToolCallReader:
    """Reads the samples of one request, each either whole or as it comes."""

    def __init__(self, form: ToolFormat, names: Sequence[str], parallel: bool) -> None:
        """Unless `parallel`, the first whole call of a sample is its last one that is reported."""
        self._form = form
        self._names = names
        self._parallel = parallel
        self._streams: dict[Sample, _Stream] = {}

    def whole(self, text: str, finish_reason: str) -> tuple[replies.Message, str]:
        """A whole answer, and why it ended.

        A call whose arguments are broken is content. One that is cut off by the limit of tokens is a call
        with the arguments that there are, as in a stream.
        """
        parser = ToolCallParser(self._form, self._names)
        taken = (Ending.WHOLE, Ending.CUT) if finish_reason == "length" else (Ending.WHOLE,)
        content: list[str] = []
        calls: list[replies.ToolCall] = []
        num_whole = 0
        begun, arguments = CallBegun("", 0), ""
        for event in [*parser.feed(text), *parser.finish()]:
            if isinstance(event, Content):
                content.append(event.text)
            elif isinstance(event, CallBegun):
                begun, arguments = event, ""
            elif isinstance(event, Arguments):
                arguments += event.text
            elif event.how not in taken:
                content.append(text[begun.at : event.at])
            elif self._parallel or not num_whole:
                function = replies.FunctionCall(begun.name, arguments)
                calls.append(replies.ToolCall(new_call_id(self._form), function))
                num_whole += event.how is Ending.WHOLE
        said = "".join(content)
        message = replies.Message(said or None, tool_calls=calls) if calls else replies.Message(said)
        return message, _finish_reason(finish_reason, num_whole)

    def delta(
        self, sample: Sample, text: str, finish_reason: str | None
    ) -> tuple[replies.ChoiceDelta, str | None]:
        """What is new of a sample, and why it ended, if it has."""
        stream = self._streams.get(sample)
        if stream is None:
            parser = ToolCallParser(self._form, self._names)
            stream = self._streams[sample] = _Stream(parser, self._form, self._parallel)
        events = stream.parser.feed(text)
        if finish_reason is not None:
            events += stream.parser.finish()
        delta = stream.delta(events)
        reason = None if finish_reason is None else _finish_reason(finish_reason, stream.num_whole)
        return delta, reason


class _Stream:
    """One sample that is told piece by piece."""

    def __init__(self, parser: ToolCallParser, form: ToolFormat, parallel: bool) -> None:
        self.parser = parser
        self.num_whole = 0
        self._form = form
        self._parallel = parallel
        self._num_told = 0
        self._tells = False  # of the call that began last

    def delta(self, events: Sequence[Event]) -> replies.ChoiceDelta:
        """The events as one delta, with one entry for each call: SDKs add them up by index."""
        content = ""
        calls: dict[int, replies.ToolCallDelta] = {}
        for event in events:
            if isinstance(event, Content):
                content += event.text
            elif isinstance(event, CallBegun):
                self._tells = self._parallel or not self.num_whole
                if self._tells:
                    call_id, function = new_call_id(self._form), replies.FunctionDelta("", event.name)
                    entry = replies.ToolCallDelta(self._num_told, function, call_id, "function")
                    calls[self._num_told] = entry
                    self._num_told += 1
            elif isinstance(event, Arguments):
                if self._tells:
                    index = self._num_told - 1
                    entry = calls.setdefault(index, replies.ToolCallDelta(index, replies.FunctionDelta("")))
                    entry.function.arguments += event.text
            elif event.how is Ending.WHOLE:
                self.num_whole += 1
        return replies.ChoiceDelta(None, content or None, list(calls.values()) or None)


def new_call_id(form: ToolFormat) -> str:
    """An id for a call. Mistral's templates insist on nine letters and digits."""
    length = 9 if form.may_have_header else 24
    letters = "".join(secrets.choice(_ID_LETTERS) for _ in range(length))
    return letters if form.may_have_header else f"call_{letters}"


def _finish_reason(reason: str, num_whole_calls: int) -> str:
    return "tool_calls" if reason == "stop" and num_whole_calls else reason
