"""A module with another source than its file's, for one process; nothing is written."""

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
"""Ours, and never imported again: nothing in them imports what is mutated."""
_forgotten: Final[list[ModuleType]] = []
"""Kept alive: Python would warn, during a test, of what is discarded with one, e.g. an event loop."""


class InMemory(MetaPathFinder):
    """Gives each module of `sources` (its file's name → source, or its tree) when it is imported."""

    def __init__(self, sources: Mapping[str, bytes | ast.Module], names: Mapping[str, Any] | None = None) -> None:
        """`names`: additional globals of the modules."""
        self._sources = {module_name(file): (file, source) for file, source in sources.items()}
        self._names = names or {}

    def install(self) -> None:
        """From here on; what is imported already is forgotten, with all of ours that may have imported it."""
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
    """Our modules are imported again where they are imported next; those of others stay."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        is_ours = file.startswith(f"{ROOT}/") and not file.startswith(f"{ROOT}/.venv/")
        if is_ours and name != "__main__" and not _is_kept(name):
            _forgotten.append(sys.modules.pop(name))
