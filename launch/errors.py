"""The one error that means: the user wrote something that cannot be."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A field's value breaks a rule.

    Its text is one line: the field and value received, the rule with its numbers, what to do next.
    The command line prints it without a traceback and exits with code 2.

    Attributes:
      field: dotted name of the field, e.g. `config.mesh.fsdp`; empty when no one field is wrong.
      rule: the rest of the message.
    """

    _NO_VALUE = object()

    def __init__(self, field: str, rule: str, value: object = _NO_VALUE):
        self.field = field
        self.rule = rule
        self.value = value
        super().__init__(str(self))

    def __str__(self) -> str:
        if not self.field:
            return self.rule
        shown = "" if self.value is self._NO_VALUE else f"={_short(self.value)}"
        return f"{self.field}{shown}: {self.rule}"

    def below(self, prefix: str) -> ConfigError:
        """The same error, its field seen from one level further out."""
        field = f"{prefix}.{self.field}" if self.field else prefix
        return ConfigError(field, self.rule, self.value)


def closest(name: str, known: Iterable[str], most: int | None = None) -> str:
    """A phrase that names the closest known name, or lists them when none is close.

    Args:
      name: what was written.
      known: what could have been.
      most: how many to list at most, the closest of them; None for all.
    """
    import difflib  # Here, because only a mistake needs it.

    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if matches:
        return f"did you mean {matches[0]!r}?"
    if most is not None and len(known) > most:
        near = difflib.get_close_matches(name, known, n=most, cutoff=0.0)
        return f"known: {', '.join(near)} and {len(known) - most} more"
    return f"known: {', '.join(known) if known else '(none)'}"


def _short(value: object, limit: int = 120) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
