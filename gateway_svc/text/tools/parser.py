"""Calls of tools out of a model's text, as it comes.

What is certain is given at once: content as soon as it cannot be the beginning of a call, a call as soon as
its name is known and its arguments begin, arguments as they come. What looked like a call and is none, for
its JSON is broken or no tool has that name, is content. How the text is cut into pieces makes no difference.

The text is read by a generator, straight on; it yields where it wants more of it. It never goes back by more
than a few short words, so that no output, however odd, takes long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator
from dataclasses import dataclass

from gateway_svc.text.tools.events import Arguments, CallBegun, CallEnded, Content, Ending, Event
from gateway_svc.text.tools.formats import ARGS_MARK, FENCE, ID_MARK, ToolFormat
from gateway_svc.text.tools.json_scan import JsonScanner, skip_space

MAX_WORD = 256  # characters, quotes and escapes included: of a key, a name, an id
_WHITE = re.compile(r"\s*")
_NAME = re.compile(r"[\w.-]*")
_FENCE_REST = re.compile(r"\w*[ \t\r]*")
_NAME_KEYS = ("name", "function")
_ARGUMENTS_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")


Steps = Generator[None, None, None]
Asks = Generator[None, None, bool]


@dataclass(slots=True)
class _Call:
    """What is known of a call that is being read."""

    name: str | None = None
    arguments: str | None = None  # held until the name is known
    begun: bool = False


class ToolCallParser:
    """One sample's text to content and calls."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        """`names` are of the tools that there are."""
        self._form = form
        self._names = frozenset(names)
        self._text = ""  # what there is of the text
        self._at = 0  # where in it reading is
        self._start = 0  # its first character that is not settled yet
        self._before = 0  # how many characters came before it
        self._ended = False
        self._run = re.compile(rf"(?s:.)[^\n{re.escape(form.opener[:1])}]*")
        self._space = ""  # settled whitespace, which is content only if content follows
        self._has_content = False
        self._has_calls = False
        self._events: list[Event] = []
        self._steps = self._read()
        next(self._steps)

    def feed(self, text: str) -> list[Event]:
        """What is certain with this text after what came before."""
        self._text = self._text[self._start :] + text
        self._at -= self._start
        self._before += self._start
        self._start = 0
        next(self._steps)
        return self._take()

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""
        self._ended = True
        next(self._steps, None)
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------------------------- content and calls

    def _read(self) -> Steps:
        fresh = True  # a call without an opener may begin here: at the start of a line, or after another call
        closer = ""  # what may come after the calls just read
        after_call = False
        while (yield from self._has_more()):
            if space := self._skip(_WHITE):
                fresh = fresh or "\n" in space
                self._space += space
            elif closer and (yield from self._next_is(closer, may_be_cut=True)):
                closer = ""
            else:
                opened = yield from self._open(fresh, after_call)
                if opened is None:
                    self._skip_run()
                else:
                    yield from self._calls(opened)
                rest = self._text[self._start : self._at]
                after_call = not rest
                fresh = after_call or _ends_line(rest)
                if rest:
                    closer = ""
                elif opened or not closer:
                    closer = FENCE if opened == FENCE else self._form.closer
                if rest:
                    self._show(rest)
            self._settle()
        if not self._has_calls:
            self._show("")

    def _open(self, fresh: bool, after_call: bool) -> Generator[None, None, str | None]:
        """Read what comes before a call: the opener, a fence, or nothing. None if no call can begin here."""
        if self._form.opener and (yield from self._next_is(self._form.opener)):
            return self._form.opener
        if fresh and (yield from self._next_is(FENCE)):
            return FENCE
        if after_call and self._text[self._at] in ",;":
            self._at += 1
            yield from self._skip_space()
        return "" if fresh and self._char() in ("{", "[") else None

    def _calls(self, opened: str) -> Steps:
        """Read what may be calls. What is of calls is settled; what is not lies before `_at` then."""
        if opened == FENCE:
            while (yield from self._has_more()) and self._skip(_FENCE_REST):
                pass
            if not (yield from self._next_is("\n")):
                return
        yield from self._skip_space()
        if self._char() == "{":
            yield from self._object()
        elif self._char() == "[":
            yield from self._array()
        elif opened and opened != FENCE and self._form.may_have_header:
            yield from self._headed()

    def _show(self, text: str) -> None:
        """Content, after the whitespace before it, unless that only parts it from a call."""
        if self._has_content or not self._has_calls:
            text = self._space + text
        self._space = ""
        if text:
            self._has_content = True
            self._events.append(Content(text))

    # --------------------------------------------------------------------------------------- a call's JSON

    def _array(self) -> Steps:
        self._at += 1
        while True:
            yield from self._skip_space()
            if self._char() != "{" or not (yield from self._object()):
                return
            yield from self._skip_space()
            if not (yield from self._next_is(",")):
                break
        if (yield from self._next_is("]")):
            self._settle()
        else:
            self._at = self._start

    def _headed(self) -> Steps:
        """Read name[CALL_ID]id[ARGS]{...}, of which only the name and the arguments must be there."""
        begin = self._at - self._start
        while (yield from self._has_more()) and self._skip(_NAME):
            pass
        name = self._text[self._start + begin : self._at]
        if name not in self._names:
            return
        if (yield from self._next_is(ID_MARK)):
            while (yield from self._has_more()) and self._skip(_NAME):
                pass
        yield from self._next_is(ARGS_MARK)
        yield from self._skip_space()
        if self._char() == "{":
            self._begin(_Call(name))
            yield from self._stream_arguments()

    def _object(self) -> Asks:
        """Read an object. Whether it is a call; its text is settled then."""
        self._at += 1
        call = _Call()
        fine = yield from self._members(call, may_nest=True)
        if fine and not call.begun and call.name is not None:
            call.arguments = "{}"
            self._give(call)
        if call.begun:
            if not fine:
                self._at = self._start  # what comes after the arguments is not the call's
            self._settle()
        return call.begun

    def _members(self, call: _Call, may_nest: bool) -> Asks:
        """Read an object's members and its end. Whether all is as in a call."""
        while True:
            key = yield from self._string()
            if key is None:
                return False
            yield from self._skip_space()
            if not (yield from self._next_is(":")):
                return False
            yield from self._skip_space()
            if not (yield from self._member(call, key, may_nest)):
                return False
            yield from self._skip_space()
            if not (yield from self._next_is(",")):
                return (yield from self._next_is("}"))

    def _member(self, call: _Call, key: str, may_nest: bool) -> Asks:
        if key in _NAME_KEYS and call.name is None:
            if may_nest and key == "function" and self._char() == "{":
                self._at += 1
                return (yield from self._members(call, may_nest=False))
            name = yield from self._string()
            if name not in self._names:
                return False
            call.name = name
            if call.arguments is not None:
                self._give(call)
            return True
        if key in _ARGUMENTS_KEYS and call.arguments is None and not call.begun:
            if call.name is not None and self._char() == "{":
                self._begin(call)
                return (yield from self._stream_arguments())
            call.arguments = _object_in((yield from self._value()))
            if call.arguments is not None and call.name is not None:
                self._give(call)
            return call.arguments is not None
        if key in _OTHER_KEYS or call.begun:
            return (yield from self._value(MAX_WORD)) is not None
        return False

    def _string(self) -> Generator[None, None, str | None]:
        """Read a short string, and whitespace before it. None if something else comes."""
        yield from self._skip_space()
        if self._char() != '"':
            return None
        raw = yield from self._value(MAX_WORD)
        return None if raw is None else str(json.loads(raw))

    def _value(self, limit: int | None = None) -> Generator[None, None, str | None]:
        """Read a value of at most `limit` characters; its JSON. None if it is broken, cut off, or longer."""
        scanner, begin = JsonScanner(), self._at - self._start
        while True:
            first = self._start + begin
            text = self._text if limit is None else self._text[: first + limit]
            self._at = scanner.feed(text, self._at)
            if scanner.ended:
                return self._text[first : self._at]
            if scanner.failed or self._ended or self._at - first == limit:
                return None
            yield

    def _stream_arguments(self) -> Asks:
        """Give the object that begins here as it comes. Whether it is whole."""
        scanner = JsonScanner()
        while True:
            begin = self._at
            self._at = scanner.feed(self._text, begin)
            if self._at > begin:
                self._events.append(Arguments(self._text[begin : self._at]))
            self._settle()
            if scanner.ended or scanner.failed or self._ended:
                break
            yield
        self._end(Ending.WHOLE if scanner.ended else Ending.BROKEN if scanner.failed else Ending.CUT)
        return scanner.ended

    def _give(self, call: _Call) -> None:
        """A call whose arguments are known."""
        self._begin(call)
        self._events.append(Arguments(call.arguments or "{}"))
        self._settle()
        self._end(Ending.WHOLE)

    def _begin(self, call: _Call) -> None:
        call.begun = True
        self._events.append(CallBegun(call.name or "", self._place - len(self._space)))
        self._space = ""

    def _end(self, how: Ending) -> None:
        self._has_calls = self._has_calls or how is Ending.WHOLE
        self._has_content = self._has_content or how is Ending.BROKEN
        self._events.append(CallEnded(how, self._place))

    # ---------------------------------------------------------------------------------------------- the text

    @property
    def _place(self) -> int:
        """The first character that is not settled, among all of the text."""
        return self._before + self._start

    def _settle(self) -> None:
        """What has been read is dealt with."""
        self._start = self._at

    def _char(self) -> str:
        """The next character of what has come; nothing if that is all."""
        return self._text[self._at : self._at + 1]

    def _has_more(self) -> Asks:
        """Whether there is another character; waits for it."""
        while self._at == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def _skip(self, pattern: re.Pattern[str]) -> str:
        """Read what matches, of what has come."""
        begin = self._at
        match = pattern.match(self._text, begin)
        self._at = match.end() if match else begin
        return self._text[begin : self._at]

    def _skip_space(self) -> Steps:
        """Go to the next character that is not JSON's whitespace, and wait for it."""
        while (yield from self._has_more()):
            at = skip_space(self._text, self._at)
            if at == self._at:
                return
            self._at = at

    def _skip_run(self) -> None:
        """Read at least one character, and on to the next line or what may be an opener."""
        match = self._run.match(self._text, self._start)
        self._at = self._start + (len(match.group().rstrip()) if match else 0)

    def _next_is(self, text: str, may_be_cut: bool = False) -> Asks:
        """Read this if it comes next; whether it did. If it `may_be_cut`, the text may end within it."""
        while True:
            piece = self._text[self._at : self._at + len(text)]
            if piece == text or (may_be_cut and self._ended and text.startswith(piece)):
                self._at += len(piece)
                return True
            if not text.startswith(piece) or self._ended:
                return False
            yield


def _ends_line(text: str) -> bool:
    """Whether what comes after is the first of its line."""
    _, newline, last = text.rpartition("\n")
    return bool(newline) and not last.strip()


def _object_in(raw: str | None) -> str | None:
    """The JSON of an object, given as such, as null, or as a string that holds it. None if it is neither."""
    if raw is None or raw.startswith("{"):
        return raw
    if raw == "null":
        return "{}"
    if not raw.startswith('"'):
        return None
    inner = str(json.loads(raw)).strip()
    scanner = JsonScanner()
    return inner if inner.startswith("{") and scanner.feed(inner) == len(inner) and scanner.ended else None
