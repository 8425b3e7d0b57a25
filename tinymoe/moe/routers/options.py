"""The options of a router, read from its class: annotated attributes, keyword arguments, and lines of the docstring."""

import inspect
import re


def options_of(cls: type, base: type) -> dict[str, inspect.Parameter]:
    """The options that a class declares, and those of its parents below `base`, as parameters; see Router.

    Raises ValueError for an annotation that is text and cannot be evaluated.
    """
    try:
        return _declared(cls, base)
    except Exception as error:  # evaluating an annotation may raise anything
        raise ValueError(f"router {cls.__name__}: an annotation cannot be evaluated ({type(error).__name__}: {error}): "
                         "correct it in its file") from None


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
