"""Templates: each a folder with a ComfyUI graph in API format, and a manifest of what a request sets in it.

    templates/<folder>/manifest.toml   see manifest.py
    templates/<folder>/graph.json

Errors are found before anything is queued: in a template when it is loaded (TemplateProblem), in a request when it is
rendered (RequestRefused). Messages name template, node and input.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from bridge.aspect_ratio import sized
from bridge.graphs import by_name, file_names, gives_no_result
from bridge.lora_chain import LORA_FILE, LoraChain
from bridge.manifest import (
    AspectRatioExtra,
    BooleanExtra,
    ControlSlot,
    FileExtra,
    Manifest,
    NumberExtra,
    SeedInput,
)
from bridge.orders import Graph, InputFile, LoraInput, ModelChoice, RenderedGraph, TrainingGraph, Upload
from bridge.template_extras import foreign_files_in, problem_of_extra
from comfyui_temporal.contracts.comfyui import JobRequest
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.uploads import InputKind

MAX_GRAPH_BYTES: Final = 512 * 1024
"""A rendered graph is stored in workflow history, where 2 MiB is the limit."""
MAX_SEED: Final = 2**64 - 1
_MAX_DERIVED_SEED: Final = 2**63 - 1


class TemplateProblem(ValueError):
    """A template cannot be used; the text names it, the node and the input."""


class RequestRefused(ValueError):
    """A request does not fit its template. `fields` has one message per field, for `payload_invalid`."""

    def __init__(self, fields: list[str]) -> None:
        super().__init__("; ".join(fields))
        self.fields = fields


class Template:
    """One checked template. Raises TemplateProblem."""

    def __init__(self, manifest: Manifest, graph: Graph) -> None:
        self.manifest = manifest
        self.graph = graph
        self._nodes = by_name(graph)
        for where, refs in manifest.refs():
            for ref in refs:
                self._check(where, ref)
        for where, values in manifest.set_values():
            for ref, value in values.items():
                self._check(where, ref)
                self._value(where, ref, value)
        self._check_sizes()
        self.result_nodes = [self._node(f"results: {name!r}", name) for name in manifest.results]
        for name, node_id in zip(manifest.results, self.result_nodes, strict=True):
            if reason := gives_no_result(graph[node_id]):
                raise self._problem(f"results: {name!r} gives no result: {reason}; name a node that saves")
        if len(set(self.result_nodes)) < len(self.result_nodes):
            raise self._problem("results: a node is named twice")
        self._file_extras = {name: extra for name, extra in manifest.extras.items() if isinstance(extra, FileExtra)}
        self._file_names = file_names(graph, self.result_nodes)
        self._lora_chain = self._chain_of_loras() if manifest.scene is Scene.IMAGE_GENERATE else None

    @property
    def template_id(self) -> str:
        return self.manifest.template_id

    def render(self, request: JobRequest, *, job_id: str) -> RenderedGraph:
        """The graph with the request's values filled in. Raises RequestRefused."""
        problems: list[str] = []
        graph = copy.deepcopy(self.graph)
        manifest = self.manifest
        resolution = manifest.resolutions[request.resolution]
        seconds = resolution.seconds
        self._put_all(graph, resolution.set)
        if setting := manifest.priorities.get(request.priority):
            self._put_all(graph, setting.set)
            seconds *= setting.seconds_factor
        self._put_texts(graph, request, problems)
        texts = {name: value for name, value in request.extras.items() if name not in self._file_extras}
        problems += foreign_files_in({"prompt": request.prompt}) + foreign_files_in(texts, "extras.")
        for name, value in request.extras.items():
            seconds *= self._put_extra(graph, name, value, problems)
        uploads = self._put_controls(graph, request, problems)
        files, of_files = self._files(request, problems)
        lora_inputs = self._put_loras(graph, request, problems)
        seconds *= self._put_images(graph, request.images or 1, problems)
        if problems:
            raise RequestRefused(problems)
        for node_id in self.result_nodes:
            inputs = graph[node_id]["inputs"]
            if "filename_prefix" in inputs:
                # Each job has its own prefix. Otherwise ComfyUI skips a node that wrote the same picture before.
                inputs["filename_prefix"] = f"comfyui-temporal/{job_id}/{self._file_names[node_id]}"
        rendered = RenderedGraph(
            template_id=self.template_id,
            pool=manifest.pool,
            graph=graph,
            uploads=uploads + of_files,
            files=files,
            models=self._model_choices(),
            lora_inputs=lora_inputs,
            result_nodes=self.result_nodes,
            images=request.images or 1,
            keep_metadata=manifest.keep_metadata,
            expected_seconds=seconds,
        )
        if len(rendered.model_dump_json()) > MAX_GRAPH_BYTES:
            raise RequestRefused([f"prompt: the graph of {self.template_id!r} is larger than {MAX_GRAPH_BYTES} bytes"])
        return rendered

    def render_training(self, base_model: str, hyperparameters: Mapping[str, Any]) -> TrainingGraph:
        """The graph of one chunk, without what changes from chunk to chunk. Raises RequestRefused."""
        training = self.manifest.training
        assert training is not None, "TemplateLibrary returns only templates of the right scene"
        graph, inputs = copy.deepcopy(self.graph), training.inputs
        problems: list[str] = []
        known = {"batch_size": inputs.batch_size, "learning_rate": inputs.learning_rate, **inputs.hyperparameters}
        problems += foreign_files_in(hyperparameters, "hyperparameters.")
        for name, value in hyperparameters.items():
            if name in known:
                self.put(graph, known[name], value)
            elif name != "epochs":
                offered = ", ".join(sorted(["epochs", *known]))
                problems.append(
                    f"hyperparameters.{name}: template {self.template_id!r} does not accept it; it accepts {offered}"
                )
        if problems:
            raise RequestRefused(problems)
        node, name = self._split(training.base_model_input)
        choice = ModelChoice(node=node, input=name, prefer=training.base_models[base_model])
        rendered = RenderedGraph(
            template_id=self.template_id,
            pool=self.manifest.pool,
            graph=graph,
            models=[*self._model_choices(), choice],
            result_nodes=self.result_nodes,
            expected_seconds=1.0,
        )

        def split(refs: list[str]) -> list[tuple[str, str]]:
            return [self._split(ref) for ref in refs]

        return TrainingGraph(
            rendered=rendered,
            save_node=self.result_nodes[0],
            folder=split(inputs.folder),
            steps=split(inputs.steps),
            existing_lora=split(inputs.existing_lora),
            lora_prefix=split(inputs.lora_prefix),
            seeds=split(inputs.seed),
        )

    def put(self, graph: Graph, refs: Iterable[str], value: Any) -> None:
        """Set graph inputs. The refs were checked when the template was loaded."""
        for ref in refs:
            node_id, name = self._split(ref)
            graph[node_id]["inputs"][name] = value

    def filled_in_later(self) -> list[tuple[str, str]]:
        """(node, input) of what is known only at run time: uploaded files, datasets, the server's models."""
        refs = [slot.image for slot in self.manifest.controls] + [model.input for model in self.manifest.models]
        refs += [ref for extra in self._file_extras.values() for ref in extra.inputs]
        if (training := self.manifest.training) is not None:
            refs += [training.base_model_input, *training.inputs.folder, *training.inputs.existing_lora]
        return [self._split(ref) for ref in refs]

    def models_needed(self) -> list[ModelChoice]:
        """The models that a server must have to run jobs. Of a training's base models one is enough."""
        choices = self._model_choices()
        if (training := self.manifest.training) is not None:
            node, name = self._split(training.base_model_input)
            patterns = [pattern for fitting in training.base_models.values() for pattern in fitting]
            choices.append(ModelChoice(node=node, input=name, prefer=list(dict.fromkeys(patterns))))
        return choices

    def _model_choices(self) -> list[ModelChoice]:
        choices = []
        for model in self.manifest.models:
            node, name = self._split(model.input)
            choices.append(ModelChoice(node=node, input=name, prefer=model.prefer))
        return choices

    def _put_texts(self, graph: Graph, request: JobRequest, problems: list[str]) -> None:
        inputs = self.manifest.inputs
        self.put(graph, inputs.prompt, request.prompt)
        negative = request.extras.get("negative_prompt")
        if isinstance(negative, str) and inputs.negative_prompt:
            self.put(graph, inputs.negative_prompt, negative)
        elif negative is not None and not isinstance(negative, str):
            problems.append("extras.negative_prompt: must be a text")
        self._put_seed(graph, request, problems)

    def _put_seed(self, graph: Graph, request: JobRequest, problems: list[str]) -> None:
        """Without a seed, derive one from the task id: another attempt of the task makes the same picture."""
        seed = request.extras.get("seed")
        if seed is None:
            seed = int.from_bytes(hashlib.sha256(request.task_id.encode()).digest()[:8], "big") & _MAX_DERIVED_SEED
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            problems.append(f"extras.seed: must be a whole number from 0 to {MAX_SEED}")
            return
        given = self.manifest.inputs.seed
        into = given if isinstance(given, SeedInput) else SeedInput(inputs=given) if given else None
        if into is not None:
            self.put(graph, into.inputs, seed % into.modulo)

    def _put_extra(self, graph: Graph, name: str, value: Any, problems: list[str]) -> float:
        """Apply one extra. Returns its factor on the run time."""
        if name in ("seed", "negative_prompt") or value is None:
            return 1.0
        extra = self.manifest.extras.get(name)
        if extra is None:
            known = ", ".join(sorted([*self.manifest.extras, "negative_prompt", "seed"]))
            problems.append(f"extras.{name}: template {self.template_id!r} does not offer it; it offers {known}")
            return 1.0
        problem = problem_of_extra(extra, value)
        if problem:
            problems.append(f"extras.{name}: {problem}")
            return 1.0
        if isinstance(extra, BooleanExtra):
            if value is False:
                return 1.0
        elif isinstance(extra, AspectRatioExtra):
            self._put_size(graph, extra, value)
        elif not isinstance(extra, FileExtra):
            self.put(graph, extra.inputs, value)
        self._put_all(graph, extra.set)
        return extra.factor_of(value) if isinstance(extra, NumberExtra) else extra.seconds_factor

    def _put_size(self, graph: Graph, extra: AspectRatioExtra, ratio: str) -> None:
        node, name = self._split(extra.width[0])
        width = graph[node]["inputs"][name]
        node, name = self._split(extra.height[0])
        height = graph[node]["inputs"][name]
        width, height = sized(ratio, width=width, height=height, multiple=extra.multiple)
        self.put(graph, extra.width, width)
        self.put(graph, extra.height, height)

    def _files(self, request: JobRequest, problems: list[str]) -> tuple[list[InputFile], list[Upload]]:
        """The files that extras name, and the graph inputs that get their names on the server."""
        files: list[InputFile] = []
        uploads: list[Upload] = []
        for name, extra in self._file_extras.items():
            value = request.extras.get(name)
            if value is None and extra.required:
                problems.append(f"extras.{name}: template {self.template_id!r} needs it: the address of a file")
            if not isinstance(value, str):
                continue
            number = len(request.controls) + len(files)
            files.append(InputFile(name=name, kind=InputKind(extra.type), address=value))
            uploads += [Upload(node=node, input=ref, control=number) for node, ref in map(self._split, extra.inputs)]
        return files, uploads

    def _put_controls(self, graph: Graph, request: JobRequest, problems: list[str]) -> list[Upload]:
        slots, given = self.manifest.controls, request.controls
        if len(given) > len(slots):
            problems.append(f"controls: template {self.template_id!r} accepts at most {len(slots)}, {len(given)} given")
        uploads: list[Upload] = []
        for number, slot in enumerate(slots):
            if number >= len(given):
                if slot.required:
                    problems.append(
                        f"controls: template {self.template_id!r} needs an image for {slot.image!r}; "
                        "give its address as image_url"
                    )
                continue
            uploads.append(self._put_control(graph, slot, number, given[number], problems))
        return uploads

    def _put_control(
        self, graph: Graph, slot: ControlSlot, number: int, control: Mapping[str, Any], problems: list[str]
    ) -> Upload:
        where = f"controls.{number}"
        if not isinstance(control.get("image_url"), str) or not control["image_url"]:
            problems.append(f"{where}.image_url: the address of an image is needed")
        strength = control.get("strength", 1.0)
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            problems.append(f"{where}.strength: must be a number from 0 to 1")
            strength = 1.0
        kind = control.get("kind")
        if kind is not None and slot.kind is not None and kind != slot.kind:
            problems.append(f"{where}.kind: template {self.template_id!r} accepts {slot.kind!r} here, not {kind!r}")
        if slot.strength is not None:
            share = min(1.0, max(0.0, float(strength)))
            span = slot.strength.at_1 - slot.strength.at_0
            self.put(graph, slot.strength.inputs, round(slot.strength.at_0 + span * share, 6))
        self._put_all(graph, slot.set)
        node, name = self._split(slot.image)
        return Upload(node=node, input=name, control=number)

    def _put_loras(self, graph: Graph, request: JobRequest, problems: list[str]) -> list[LoraInput]:
        """Insert a loader for each LoRA. Its file is named once it is on the server."""
        loras = request.loras or []
        if len(loras) > self.most_loras:
            taken = f"accepts at most {self.most_loras}" if self.most_loras else "accepts none"
            problems.append(f"loras: template {self.template_id!r} {taken}, {len(loras)} given")
            return []
        if self._lora_chain is None:
            return []
        nodes = self._lora_chain.insert(graph, [lora.strength for lora in loras])
        return [LoraInput(node=node, input=LORA_FILE, lora=number) for number, node in enumerate(nodes)]

    def _put_images(self, graph: Graph, images: int, problems: list[str]) -> float:
        """Say how many images the run makes. Returns its factor on the run time."""
        place = self.manifest.images
        if images > place.limit:
            taken = f"makes at most {place.limit}" if place.limit > 1 else "makes one image at a time"
            problems.append(f"images: template {self.template_id!r} {taken}, {images} given")
        self.put(graph, place.inputs, images)
        return 1 + (images - 1) * place.seconds_factor

    @property
    def most_loras(self) -> int:
        """How many LoRAs a request may name."""
        return self.manifest.loras.most if self._lora_chain is not None else 0

    def _chain_of_loras(self) -> LoraChain | None:
        """Where LoRAs go; None if the graph has no such place. Raises TemplateProblem."""
        place = self.manifest.loras
        if not place.model:
            return LoraChain.of_checkpoint(self.graph)

        def output(name: str, link: list[Any]) -> tuple[str, int]:
            node, number = self._value("loras", name, link)
            return node, number

        chain = LoraChain(output("model", place.model), output("clip", place.clip) if place.clip else None)
        if not chain.is_used(self.graph):
            raise self._problem("loras: nothing in the graph takes the output that `model` names")
        return chain

    def _put_all(self, graph: Graph, values: Mapping[str, Any]) -> None:
        for ref, value in values.items():
            self.put(graph, [ref], self._value("", ref, value))

    def _value(self, where: str, ref: str, value: Any) -> Any:
        """A manifest's value for the graph, with the node of a link by its id. Raises TemplateProblem."""
        if not isinstance(value, list):
            return value
        is_link = len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
        if not is_link or isinstance(value[1], bool):
            raise self._problem(f"{where}: {ref!r} must be a value or a link [node, output]")
        return [self._node(f"{where}: {ref!r} links to {value[0]!r}", value[0]), value[1]]

    def _check(self, where: str, ref: str) -> None:
        node_id, name = self._split(ref, where)
        if name not in self.graph[node_id]["inputs"]:
            has = ", ".join(sorted(self.graph[node_id]["inputs"])) or "none"
            raise self._problem(f"{where}: node {ref.removesuffix(f'.{name}')!r} has no input {name!r}; it has {has}")

    def _check_sizes(self) -> None:
        """An aspect ratio needs the pixels of every resolution."""
        for name, extra in self.manifest.extras.items():
            if not isinstance(extra, AspectRatioExtra):
                continue
            for resolution in self.manifest.resolutions.values():
                graph = copy.deepcopy(self.graph)
                self._put_all(graph, resolution.set)
                for ref in (extra.width[0], extra.height[0]):
                    node, name_of_input = self._split(ref)
                    pixels = graph[node]["inputs"][name_of_input]
                    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1:
                        raise self._problem(f"extras.{name}: {ref!r} must be a number of pixels, not {pixels!r}")

    def _split(self, ref: str, where: str = "") -> tuple[str, str]:
        """(node id, input). Titles and inputs may have dots: `Resize.resize_type.width`."""
        parts = ref.split(".")
        splits = [(".".join(parts[:end]), ".".join(parts[end:])) for end in range(len(parts) - 1, 0, -1)]
        for title, name in splits:
            nodes = self._nodes.get(title, [])
            if len(nodes) == 1 and name in self.graph[nodes[0]]["inputs"]:
                return nodes[0], name
        title, name = next((split for split in splits if split[0] in self._nodes), splits[0])
        return self._node(f"{where}: {ref!r}", title), name

    def _node(self, where: str, name: str) -> str:
        found = self._nodes.get(name, [])
        if len(found) == 1:
            return found[0]
        reason = "is not in the graph" if not found else "is the title of several nodes: use an id"
        raise self._problem(f"{where}: node {name!r} {reason}")

    def _problem(self, what: str) -> TemplateProblem:
        return TemplateProblem(f"template {self.template_id!r}: {what}")
