"""Which claims of a caller's token name tenant, user and scopes, and what wider scopes mean (contract §7).

Only the named claims count: a token whose tenant is not named there is refused, whatever else it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from comfyui_temporal.contracts.permissions import Scope

_SEPARATORS: Final = str.maketrans(",", " ")


@dataclass(frozen=True)
class CallerClaims:
    """Names of claims; `a.b` is the claim `b` in the object `a`, unless there is a claim `a.b` itself."""

    tenant: str = "tenant_id"
    user: str = "user_id"
    scopes: str = "scopes"
    default_user: str | None = None
    """The user of tokens without one; None: such a token is refused."""
    meanings: Mapping[str, Sequence[Scope]] = field(default_factory=dict)
    """A wider scope → ours that it means."""

    def read(self, claims: Mapping[str, Any]) -> dict[str, Any]:
        """`tenant_id`, `user_id` and `scopes` of a token, without those that it does not name."""
        user = _at(claims, self.user)
        named = {
            "tenant_id": _at(claims, self.tenant),
            "user_id": self.default_user if user is None else user,
            "scopes": self._scopes(_at(claims, self.scopes)),
        }
        return {name: value for name, value in named.items() if value is not None}

    def _scopes(self, value: Any) -> Any:
        """A list, or a text with blanks or commas in between, as OAuth's `scope` is."""
        if isinstance(value, str):
            value = value.translate(_SEPARATORS).split()
        if not isinstance(value, list):
            return value
        meant = [scope.value for given in value if isinstance(given, str) for scope in self.meanings.get(given, ())]
        return [*value, *meant]


def _at(claims: Mapping[str, Any], name: str) -> Any:
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
