"""All templates of a bridge, read from their folders."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from bridge.graphs import GraphProblem, read_graph
from bridge.manifest import Manifest
from bridge.templates import Template, TemplateProblem
from comfyui_temporal.contracts.errors import sentences_of
from comfyui_temporal.contracts.permissions import Scene

SHIPPED: Final = Path(__file__).parent / "templates"


class TemplateLibrary:
    """All templates of a bridge, by id."""

    def __init__(self, templates: Iterable[Template]) -> None:
        self._templates: dict[str, Template] = {}
        for template in templates:
            if template.template_id in self._templates:
                raise TemplateProblem(f"template {template.template_id!r}: two folders have this template_id")
            self._templates[template.template_id] = template

    def replace(self, loaded: TemplateLibrary) -> None:
        """Have the templates of another library from now on."""
        self._templates = dict(loaded._templates)

    def get(self, template_id: str, scene: Scene) -> Template | None:
        found = self._templates.get(template_id)
        return found if found is not None and found.manifest.scene is scene else None

    def __iter__(self) -> Any:
        return iter(self._templates.values())

    def of_pools(self, pools: Iterable[str]) -> list[Template]:
        wanted = set(pools)
        return [template for template in self._templates.values() if template.manifest.pool in wanted]

    def of_scene(self, scene: Scene) -> list[Template]:
        return [template for template in self._templates.values() if template.manifest.scene is scene]


def load_library(*folders: Path) -> TemplateLibrary:
    """Every template in these folders; a later folder overrides an earlier one. Raises TemplateProblem."""
    found: dict[str, Template] = {}
    for folder in folders:
        if not folder.is_dir():
            raise TemplateProblem(f"{folder} is not a folder")
        here: dict[str, Path] = {}
        for path in sorted(folder.glob("*/manifest.toml")):
            template = load_template(path.parent)
            if template.template_id in here:
                raise TemplateProblem(
                    f"template {template.template_id!r}: both {here[template.template_id]} and {path.parent} name it"
                )
            here[template.template_id] = path.parent
            found[template.template_id] = template
    if not found:
        raise TemplateProblem(f"no template in {', '.join(str(folder) for folder in folders)}")
    return TemplateLibrary(found.values())


def load_template(folder: Path) -> Template:
    """Raises TemplateProblem."""
    path = folder / "manifest.toml"
    try:
        manifest = Manifest.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TemplateProblem(f"{path}: {error}") from None
    except ValidationError as error:
        raise TemplateProblem(f"{path}: {'; '.join(sentences_of(error))}") from None
    try:
        return Template(manifest, read_graph(folder / manifest.graph))
    except GraphProblem as problem:
        raise TemplateProblem(f"template {manifest.template_id!r}: {problem}") from None
