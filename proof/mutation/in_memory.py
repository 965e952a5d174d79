"""A module with a changed source, for one process; nothing is written."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from types import CodeType, ModuleType
from typing import Any, Final

from proof.mutation.mutations import ROOT

KEPT: Final = ("comfyui_temporal", "proof", "proof.mutation", "comfyui_temporal.process_end")
"""Our modules that are never imported again: they import no mutated module."""
_forgotten: Final[list[ModuleType]] = []
"""Kept alive: if one were discarded during a test, Python would warn, e.g. of its event loop."""


class InMemory(MetaPathFinder):
    """Gives each module of `sources` (its file's name → source, or its tree) when it is imported."""

    def __init__(self, sources: Mapping[str, bytes | ast.Module], names: Mapping[str, Any] | None = None) -> None:
        """`names`: additional globals of the modules."""
        self._sources = {module_name(file): (file, source) for file, source in sources.items()}
        self._names = names or {}

    def install(self) -> None:
        """Begin. Modules that are imported already are forgotten, with all of ours that may have imported them."""
        forget()
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._sources:
            return None
        file, source = self._sources[fullname]
        loader = _Loader(fullname, str(ROOT / file), source, self._names)
        return spec_from_file_location(fullname, ROOT / file, loader=loader)


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: bytes | ast.Module, names: Mapping[str, Any]) -> None:
        super().__init__(fullname, path)
        self._given = source
        self._names = names

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._given, self.path, "exec")
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._names)
        super().exec_module(module)


def module_name(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _is_kept(name: str) -> bool:
    return name in KEPT or name.startswith(("comfyui_temporal.", "proof.mutation."))


def forget() -> None:
    """Our modules are imported again at their next import; other modules are kept."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        is_ours = file.startswith(f"{ROOT}/") and not file.startswith(f"{ROOT}/.venv/")
        if is_ours and name != "__main__" and not _is_kept(name):
            _forgotten.append(sys.modules.pop(name))
