"""A manifest as text, from the roles that were found in a graph. What is left to decide stands in it as a comment."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from bridge.graph_roles import MOST_SEED, Roles
from bridge.graph_wiring import Held, Place
from bridge.graphs import by_name
from bridge.orders import Graph
from comfyui_temporal.contracts.comfyui import Resolution

DECIDE: Final = "Decide: "
WIDTH: Final = 110
LONGEST_TITLE: Final = 100
RATIOS: Final = ("1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16")
PRICED: Final = "An extra is offered where COMFYUI_TEMPORAL_PRICES names it, be it with 0 points."
SECONDS: Final = {Resolution.SD: 10, Resolution.HD: 25, Resolution.UHD: 90}
VIDEO_SECONDS: Final = {Resolution.SD: 60, Resolution.HD: 120, Resolution.UHD: 300}


class AmbiguousName(ValueError):
    """No text names this input, and nothing else, in a manifest."""


class ManifestText:
    """The manifest of one template. Raises AmbiguousName."""

    def __init__(self, graph: Graph, results: Sequence[str], roles: Roles) -> None:
        self._graph = graph
        self._names = by_name(graph)
        self._results = results
        self._roles = roles

    def written(self, template_id: str, made_from: str) -> str:
        parts = [
            [
                *_comment(f"Made from {made_from}. Each {DECIDE.strip()} is for you, who know the graph."),
                f"template_id = {_text(template_id)}",
                f"summary = {_text(template_id)}",
                *self._questions("results"),
                f"results = [{', '.join(_text(self._node(node)) for node in self._results)}]",
            ],
            self._inputs(),
            self._images(),
            *self._controls(),
            *self._models(),
            self._loras(),
            *self._resolutions(),
            self._aspect_ratio(),
            self._steps(),
            *self._files(),
        ]
        return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"

    def _inputs(self) -> list[str]:
        roles = self._roles
        given = {"prompt": roles.prompt, "negative_prompt": roles.negative_prompt}
        narrow = roles.most_seed < MOST_SEED
        given |= {} if narrow else {"seed": roles.seeds}
        lines = ["[inputs]", *self._questions("inputs")]
        lines += [f"{name} = {self._refs(places)}{self._kinds(places)}" for name, places in given.items() if places]
        if narrow and roles.seeds:
            lines += ["", "[inputs.seed]", f"inputs = {self._refs(roles.seeds)}{self._kinds(roles.seeds)}"]
            lines += [f"modulo = {roles.most_seed + 1}"]
        return lines

    def _images(self) -> list[str]:
        place = self._roles.images
        return [] if place is None else ["[images]", f"inputs = {self._refs([place])}{self._kinds([place])}"]

    def _controls(self) -> Iterable[list[str]]:
        if questions := self._questions("controls"):
            yield questions
        for picture in self._roles.pictures:
            lines = ["[[controls]]", f"image = {self._ref(picture.place)}{self._kinds([picture.place])}"]
            if (strength := picture.strength) is not None:
                inputs = self._refs([strength.place])
                lines.append(f"strength = {{ inputs = {inputs}, at_0 = 0.0, at_1 = {float(strength.value)!r} }}")
            yield lines

    def _models(self) -> Iterable[list[str]]:
        for model in self._roles.models:
            patterns = ", ".join(_text(pattern) for pattern in patterns_of(model))
            yield ["[[models]]", f"input = {self._ref(model.place)}", f"prefer = [{patterns}]"]

    def _loras(self) -> list[str]:
        roles, questions = self._roles, self._questions("loras")
        if roles.lora_model is None:
            return ["[loras]", *questions, "most = 0"] if questions else []
        given = {"model": roles.lora_model, "clip": roles.lora_clip}
        lines = [f"{name} = [{_text(self._node(output[0]))}, {output[1]}]" for name, output in given.items() if output]
        return ["[loras]", *questions, *lines]

    def _resolutions(self) -> Iterable[list[str]]:
        roles = self._roles
        yield _comment(
            "`seconds` is a first estimate: what is measured can only raise it. Put what your servers need."
        ) + self._questions("resolutions")
        seconds = VIDEO_SECONDS if roles.is_video else SECONDS
        for resolution in Resolution:
            lines = [f"[resolutions.{resolution.value}]", f"seconds = {seconds[resolution]}"]
            if sizes := roles.sizes.get(resolution):
                values = ", ".join(f"{self._ref(place)} = {length}" for place, length in sizes.items())
                lines.append(f"set = {{ {values} }}")
            yield lines

    def _aspect_ratio(self) -> list[str]:
        roles = self._roles
        if not roles.widths:
            return []
        return [
            *_comment(PRICED),
            "[extras.aspect_ratio]",
            'type = "aspect_ratio"',
            f"width = {self._refs(roles.widths)}{self._kinds(roles.widths)}",
            f"height = {self._refs(roles.heights)}{self._kinds(roles.heights)}",
            f"choices = [{', '.join(_text(ratio) for ratio in RATIOS)}]",
        ]

    def _steps(self) -> list[str]:
        steps, questions = self._roles.steps, self._questions("extras")
        if steps is None:
            return questions
        return [
            *questions,
            *_comment(PRICED),
            "[extras.steps]",
            'type = "integer"',
            f"inputs = {self._refs([steps.place])}{self._kinds([steps.place])}",
            "minimum = 1",
            f"maximum = {self._roles.most_steps}",
            f"seconds_at = {steps.value}",
        ]

    def _files(self) -> Iterable[list[str]]:
        counted: Counter[str] = Counter()
        for kind, place in self._roles.files:
            counted[kind.value] += 1
            name = kind.value if counted[kind.value] == 1 else f"{kind.value}_{counted[kind.value]}"
            yield [
                *_comment(PRICED),
                f"[extras.{name}]",
                f"type = {_text(kind.value)}",
                f"inputs = {self._refs([place])}{self._kinds([place])}",
                "required = true",
            ]

    def _questions(self, part: str) -> list[str]:
        return [line for question in self._roles.questions.get(part, []) for line in _comment(DECIDE + question)]

    def _refs(self, places: Iterable[Place]) -> str:
        return f"[{', '.join(self._ref(place) for place in places)}]"

    def _ref(self, place: Place) -> str:
        node, name = place
        for known in (self._node(node), node):
            ref = f"{known}.{name}"
            if self._read(ref) == [place]:
                return _text(ref)
        raise AmbiguousName(f"node {node!r}, input {name!r}: rename the node: its id can be read in two ways")

    def _read(self, ref: str) -> list[Place]:
        """Every way to read `node.input`: names of nodes and inputs may have dots."""
        parts = ref.split(".")
        splits = [(".".join(parts[:end]), ".".join(parts[end:])) for end in range(1, len(parts))]
        return [
            (node, name)
            for title, name in splits
            for node in self._names.get(title, [])
            if name in self._graph[node]["inputs"]
        ]

    def _node(self, node: str) -> str:
        """A node's title, if that names it alone, else its id."""
        title = (self._graph[node].get("_meta") or {}).get("title")
        if not isinstance(title, str) or title.strip() != title or not title.isprintable():
            return node
        return title if 0 < len(title) <= LONGEST_TITLE and self._names[title] == [node] else node

    def _kinds(self, places: Iterable[Place]) -> str:
        """What nodes are that are named by a mere id, for people."""
        kinds = [self._graph[node]["class_type"] for node, _ in places if self._node(node) == node]
        return f"  # {one_line(', '.join(dict.fromkeys(kinds)))}" if kinds else ""


def patterns_of(model: Held) -> list[str]:
    """The model by its name, then in any other folder: servers keep their files as they like."""
    *folders, name = re.split(r"[/\\]", model.value)
    plain = re.sub(r"([*?[])", r"[\1]", name)
    exact = re.sub(r"([*?[])", r"[\1]", model.value)
    return list(dict.fromkeys([exact, *([plain] if folders else []), rf"*[/\]{plain}"]))


def one_line(text: str) -> str:
    """The text without what would break a line or move a terminal's cursor."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        one_line(text),
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _text(text: str) -> str:
    """A TOML string."""
    if "\\" in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
