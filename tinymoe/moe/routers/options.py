"""The options of a router, read from its class: annotated attributes, keyword arguments, and lines of the docstring."""

import functools
import inspect
import re

from ..settings import check_of

OF_THE_MODEL = {"vocab_size", "n_real"}  # options that a model sets


def options_of(cls: type, base: type) -> dict[str, inspect.Parameter]:
    """The options that a class declares, and those of its parents below `base`, as parameters; see Router.

    Raises ValueError for an annotation that is text and cannot be evaluated.
    """
    try:
        return _declared(cls, base)
    except Exception as error:  # evaluating an annotation may raise anything
        raise ValueError(f"router {cls.__name__}: an annotation cannot be evaluated ({type(error).__name__}: {error}): "
                         "correct it in its file") from None


@functools.cache
def _declared(cls, base):
    found = {}
    for each in reversed(cls.__mro__[:cls.__mro__.index(base)]):
        own, arguments = vars(each), {}
        if "__init__" in own:
            arguments = inspect.signature(each.__init__, eval_str=True).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in arguments.values()):
                found = {}  # its parent's options are not passed on
        found = {name: p for name, p in found.items() if name not in own}
        found |= {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=own[name], annotation=kind)
                  for name, kind in inspect.get_annotations(each, eval_str=True).items()
                  if name in own and not hasattr(base, name)}
        found |= {name: p for name, p in arguments.items() if p.default is not p.empty}
    return found


def meaning_of(cls: type, option: str) -> str:
    """The lines after `option:` in the docstring of the class, or of one above it; "" if there are none."""
    for each in cls.__mro__:
        found = re.search(rf"^(?:\w+, )*{option}(?:, \w+)*: (.*(?:\n +.*)*)", inspect.getdoc(each) or "", re.M)
        if found:
            return " ".join(found[1].split())
    return ""


def check_options(cls: type, base: type, options: dict) -> None:
    """Raise ValueError for an option that a class below `base` does not take, or a value of a wrong type."""
    known = options_of(cls, base)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name} is no option of {cls.name}, which takes {', '.join(known) or 'none'}"
                             f"{why_not(cls, base, name)}")
        if check := check_of(known[name].annotation):
            check.require(name, value)


def why_not(cls, base, name):
    """What to do about an attribute that is no option: annotate it, unless a parent's option is fixed by it."""
    default, parents = getattr(cls, name, None), cls.__mro__[1:cls.__mro__.index(base)]
    if default is None or hasattr(base, name) or callable(default):
        return ""
    if any(name in options_of(parent, base) for parent in parents if issubclass(parent, base)):
        return f": the class fixes it at {default!r}"
    return f": to make it one, annotate it in the class, `{name}: {type(default).__name__} = {default!r}`"
