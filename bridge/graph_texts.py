"""Which texts of a graph are its prompt and its negative prompt: those of the text encoders that reach its samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from bridge.graph_wiring import Held, Place, Wiring
from bridge.graphs import is_link

TEXTS: Final = ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "prompt")
"""Inputs of text encoders. One with several takes the same prompt in each."""
ROLES: Final = ("positive", "negative")
ZEROED: Final = "ConditioningZeroOut"
"""Whatever text is above it, the sampler gets none of it."""


class Encoders:
    """The texts that reach the samplers' inputs of one role, `positive` or `negative`."""

    def __init__(self, wiring: Wiring, role: str) -> None:
        self._wiring = wiring
        self._role = role
        self._seen: set[tuple[str, int]] = set()
        self.texts: dict[str, list[Held]] = {}
        """Encoder → its texts."""
        self.lost: list[str] = []
        """The nodes at which the way to a text ends."""
        for node in wiring.needed:
            value = wiring.inputs(node).get(role)
            if isinstance(value, str):
                self.texts[node] = [Held((node, role), value)]
            elif is_link(value):
                self._walk(value)
        if role == "positive":
            for node in wiring.needed:
                conditioning = wiring.inputs(node).get("conditioning")
                if wiring.kind(node).endswith("Guider") and is_link(conditioning):
                    self._walk(conditioning)

    @property
    def is_found(self) -> bool:
        """Every encoder that was found holds the same texts: a request's prompt may take the place of them all."""
        held = {frozenset(text.value for text in texts) for texts in self.texts.values()}
        return len(held) == 1

    @property
    def places(self) -> set[Place]:
        """Where its texts stand."""
        return {text.place for text in self.all_texts()}

    def all_texts(self) -> list[Held]:
        return list({text.place: text for texts in self.texts.values() for text in texts}.values())

    def _walk(self, link: list[Any]) -> None:
        node, output = link
        if (node, output) in self._seen:
            return
        self._seen.add((node, output))
        if self._wiring.kind(node) == ZEROED:
            return
        names = [name for name in TEXTS if name in self._wiring.inputs(node)]
        if names:
            self._read(node, names)
            return
        onward = self._onward(node, output)
        if not onward:
            self.lost.append(node)
        for further in onward:
            self._walk(further)

    def _read(self, node: str, names: Sequence[str]) -> None:
        held = [self._wiring.source(node, name) for name in names]
        texts = [
            text
            for text in held
            if text and isinstance(text.value, str) and self._wiring.serves_only(text.place, TEXTS)
        ]
        if len(texts) == len(names):
            self.texts[node] = texts
        else:
            self.lost.append(node)

    def _onward(self, node: str, output: int) -> list[list[Any]]:
        """The links from which a node that is no encoder has its conditioning."""
        inputs = self._wiring.inputs(node)
        if all(is_link(inputs.get(role)) for role in ROLES):
            # Such nodes give both again, the positive one first; pipes give them as one.
            is_pair = output < len(ROLES) and "pipe" not in self._wiring.kind(node).lower()
            return [inputs[ROLES[output] if is_pair else self._role]]
        links = {name: value for name, value in inputs.items() if is_link(value)}
        conditioning = [value for name, value in links.items() if name.startswith("cond")]
        if conditioning:
            return conditioning
        return list(links.values()) if len(links) == 1 else []
