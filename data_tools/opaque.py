"""Opaque texts: strings with blanks that record what a chat template asks of them, and the template that is watched.

A blank stands for words that the template does not look for. What is made of an opaque text is opaque too, and whatever
looks at it in a way that is not recorded (takes lengths, changes case, compares with an order, hands it to other code)
is noted as ``unsafe``. Python code written in C reads strings without asking, so operators, filters, tests and calls of
the template are watched as well; those that are known to ask only what is recorded are let through.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from types import GeneratorType
from typing import Any, Self, cast

from .schema import Message, Rejected
from .templates import ChatTemplate

MARK = "\ue000"  # begins every blank
CLOSED, LOOSE = "\ue001", "\ue002"  # end a blank; LOOSE one whose text may have white space at its end
BLANK = re.compile(f"{MARK}\\\\([0-9]+)[{CLOSED}{LOOSE}]")  # JSON would double the backslash, so it is not found there


class Log:
    """What a template asked of opaque texts: the words it looked for, what it stripped, whether it did anything else."""

    def __init__(self) -> None:
        self.words: set[str] = set()
        self.stripped = False  # the end of a text that may end in white space
        self.unsafe = False


class Watched:
    """A chat template that is watched while it renders; see ``Rendering`` in ``templates.py``.

    transformers hands templates plain copies of all texts, so this renders with a watched copy of the same template.
    """

    def __init__(self, template: ChatTemplate, log: Log) -> None:
        self.source = template.source
        self.special_tokens = template.special_tokens
        self.token_pattern = template.token_pattern
        self._template = template
        self._log = log

    def render(self, messages: Sequence[Message], *, prompt: bool, kwargs: Mapping[str, Any]) -> str:
        """The text of a conversation whose texts hold blanks. Raises Rejected."""
        opaque: list[dict[str, Any]] = []
        for message in messages:
            turn = {**message.as_dict(), "content": Opaque.of(message.content, self._log)}
            if message.reasoning is not None:
                turn["thinking"] = turn["reasoning_content"] = Opaque.of(message.reasoning, self._log)
            opaque.append(turn)
        special = self._template.tokenizer.special_tokens_map
        values = {"tools": None, "documents": None, **special, **kwargs}
        try:
            text = _watched(self.source).render(messages=opaque, add_generation_prompt=prompt, **values)
        except Exception as error:  # noqa: BLE001 - a template is a program of its own
            raise Rejected("template_error", str(error)) from None
        return str.__str__(text)


class Opaque(str):
    """A text that records what is asked of it. ``whole``: it is a message's text or a part of it, not joined of several."""

    __slots__ = ("log", "whole")
    log: Log
    whole: bool

    @classmethod
    def of(cls, text: str, log: Log, *, whole: bool = True) -> Self:
        """An opaque text with this log."""
        made = cls(text)
        made.log = log
        made.whole = whole
        return made

    def __bool__(self) -> bool:
        return str.__len__(self) > 0  # part of the shape

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> "Opaque":
        return Opaque.of(str.__add__(self, other), self.log, whole=False)

    def __radd__(self, other: str) -> "Opaque":
        return Opaque.of(str.__add__(other, self), self.log, whole=False)


def _crosses(text: str, word: str) -> bool:
    """Whether a word could stand across the border of a blank: begin in it or end in it, or lie over all of a literal."""
    if len(word) == 1:
        return False
    parts = BLANK.split(text)[::2]
    last = len(parts) - 1
    return any(
        (place > 0 and any(part.startswith(word[n:]) for n in range(1, len(word))))
        or (place < last and any(part.endswith(word[:n]) for n in range(1, len(word))))
        or (0 < place < last and part in word)
        for place, part in enumerate(parts)
    )


def _looks_for(name: str) -> Callable[..., Any]:
    """A method that depends only on whether and where a fixed word stands in the text."""
    original: Callable[..., Any] = getattr(str, name)
    compares = name in ("__eq__", "__ne__")
    only_word = compares or name in ("__contains__", "startswith", "endswith")

    def method(self: Opaque, *args: Any) -> Any:
        log = self.log
        if not args or (only_word and len(args) > 1):
            log.unsafe = True  # splits at white space; looks at a place
        for word in [part for arg in args[:1] for part in (arg if isinstance(arg, tuple) else (arg,))]:
            if isinstance(word, str) and word:
                log.words.add(str.__str__(word))
                if not self.whole and _crosses(str.__str__(self), str.__str__(word)):
                    log.unsafe = True
            elif not (compares and (word is None or isinstance(word, str))):
                log.unsafe = True
        return _wrap(original(self, *args), self, whole=self.whole and name != "replace")

    return method


def _strips(name: str) -> Callable[..., Any]:
    original: Callable[..., Any] = getattr(str, name)

    def method(self: Opaque, chars: str | None = None) -> Any:
        if chars is not None and str.strip(chars):
            self.log.unsafe = True  # a blank has no white space at its ends; of other characters nothing is known
        if name != "lstrip" and str.rstrip(self).endswith(LOOSE):
            self.log.stripped = True
        return _wrap(original(self, chars), self, whole=self.whole)

    return method


def _refuses(name: str) -> Callable[..., Any]:
    original: Callable[..., Any] = getattr(str, name)

    def method(self: Opaque, *args: Any, **kwargs: Any) -> Any:
        self.log.unsafe = True
        return original(self, *args, **kwargs)

    return method


def _wrap(value: Any, source: Opaque, *, whole: bool) -> Any:
    if isinstance(value, str):
        return Opaque.of(value, source.log, whole=whole)
    if isinstance(value, (list, tuple)):
        return type(value)(_wrap(part, source, whole=whole) for part in cast("list[Any]", value))
    return value


_LOOKS = ("__contains__", "__eq__", "__ne__", "startswith", "endswith", "split", "rsplit", "partition", "rpartition",
          "replace")  # fmt: skip
_STRIPS = ("strip", "lstrip", "rstrip")
_FREE = ("__new__", "__init__", "__getattribute__", "__class__", "__doc__", "__init_subclass__", "__subclasshook__",
         "__setattr__", "__delattr__", "__dir__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getstate__",
         "__sizeof__", "maketrans")  # fmt: skip
for _name in dir(str):
    if _name in _LOOKS:
        setattr(Opaque, _name, _looks_for(_name))
    elif _name in _STRIPS:
        setattr(Opaque, _name, _strips(_name))
    elif _name not in _FREE and _name not in vars(Opaque):
        setattr(Opaque, _name, _refuses(_name))


# Filters that place a text, or ask it through its own methods; of the others' doings nothing is known.
_FILTERS = {"trim", "string", "default", "d", "length", "count", "first", "last", "list", "reverse", "replace", "items",
            "map", "select", "selectattr", "reject", "rejectattr"}  # fmt: skip
_TESTS = {"defined", "undefined", "none", "string", "mapping", "number", "boolean", "true", "false", "integer", "float",
          "sequence", "iterable", "callable"}  # fmt: skip
_JINJAS_OWN = (
    "_loop_vars",
    "_block_vars",
)  # names in sight of a call, which Jinja adds; the function does not get them
_EQUALS = {"eq", "equalto", "==", "ne", "!="}


def _find(value: Any) -> Opaque | None:
    """An opaque text in a value, containers opened."""
    if isinstance(value, str):
        return value if isinstance(value, Opaque) else None
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = cast("dict[Any, Any]", value).values()
    elif isinstance(value, (list, tuple)):
        inner = cast("list[Any]", value)
    elif type(value).__name__ == "Namespace":
        inner = vars(value).values()
    return next((found for part in inner if (found := _find(part)) is not None), None)


def _note(*values: Any) -> None:
    """Something looks at these values in a way that is not recorded."""
    if (found := _find(values)) is not None:
        found.log.unsafe = True


def _joined(parts: Iterable[Any], between: str = "") -> str:
    """Texts joined; opaque when one of them is."""
    texts = [str(part) for part in parts]
    found = _find([*texts, between])
    text = str.join(str.__str__(between), [str.__str__(part) for part in texts])
    return text if found is None else Opaque.of(text, found.log, whole=False)


def _contains(value: Any, inside: Any) -> bool:
    if isinstance(value, Opaque) and not isinstance(inside, (Opaque, list, tuple)):
        _note(value)  # of a plain text it would not be asked
    return value in inside


def _guarded(name: str, function: Callable[..., Any], kept: set[str]) -> Callable[..., Any]:
    """A filter or test that notes opaque texts, unless it is one that may have them as its first value."""
    passes = int(hasattr(function, "jinja_pass_arg"))  # the environment or context comes first

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(list(cast("Iterable[Any]", arg)) if isinstance(arg, GeneratorType) else arg for arg in args)
        value, others = args[passes], args[passes + 1 :]
        if name in _EQUALS or (name in ("default", "d")):
            return function(*args, **kwargs)
        if name == "join" and len(args) <= passes + 2 and not kwargs and isinstance(value, (list, tuple)):
            return _joined(cast("list[Any]", value), *others)
        if name not in kept or (name == "replace" and not isinstance(value, Opaque)):
            _note(value)
        if not (name == "replace" and isinstance(value, Opaque)):
            _note(others, kwargs)
        return function(*args, **kwargs)

    return call


@lru_cache(maxsize=16)
def _watched(source: str) -> Any:
    """A template compiled like transformers' own, in which everything that could read an opaque text is watched."""
    from jinja2 import nodes
    from jinja2.runtime import Macro
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,  # pyright: ignore[reportPrivateUsage] - no public name reaches the same environment
    )

    official: Any = _compile_jinja_template(source).environment
    env: Any = official.overlay()
    env.filters = {name: _guarded(name, function, _FILTERS) for name, function in official.filters.items()}
    env.tests = {name: _guarded(name, function, _TESTS) for name, function in official.tests.items()}
    env.tests["in"] = _contains
    env.filters["opaque_join"] = _joined
    env.concat = _joined
    env.intercepted_binops = frozenset({"%"})

    def call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        own = isinstance(getattr(function, "__self__", None), Opaque)
        if not (own or isinstance(function, Macro) or function is Namespace or function is dict):
            _note(args, {name: value for name, value in kwargs.items() if name not in _JINJAS_OWN})
        return official.call(context, function, *args, **kwargs)

    def call_binop(_context: Any, _operator: str, left: Any, right: Any) -> Any:
        _note(left, right)
        return left % right

    def getitem(value: Any, key: Any) -> Any:
        _note(key)
        return official.getitem(value, key)

    env.call, env.call_binop, env.getitem = call, call_binop, getitem

    class Rewriter(NodeTransformer):
        """Operators that the environment cannot intercept become filters and tests."""

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802 - Jinja's name
            self.generic_visit(node)
            return nodes.Filter(nodes.List(node.nodes), "opaque_join", [], [], None, None, lineno=node.lineno)

        def visit_Compare(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            if not any(operand.op in ("in", "notin") for operand in node.ops):
                return node
            (operand,) = node.ops  # a chain raises ValueError: no plan
            test = nodes.Test(node.expr, "in", [operand.expr], [], None, None, lineno=node.lineno)
            return test if operand.op == "in" else nodes.Not(test, lineno=node.lineno)

    tree = Rewriter().visit(env.parse(source))
    if next(tree.find_all(nodes.EvalContextModifier), None) is not None:
        raise ValueError("the template switches escaping")
    return env.template_class.from_code(env, env.compile(tree), env.make_globals(None))
