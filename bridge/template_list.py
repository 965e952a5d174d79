"""The templates of a bridge as people and services see them: inputs, types, prices, and which servers can run them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bridge.manifest import AspectRatioExtra, BooleanExtra, ChoiceExtra, Extra, FileExtra, Manifest, NumberExtra
from bridge.orders import ServerReport
from bridge.seen_server import SeenServer
from bridge.templates import Template
from comfyui_temporal.contracts.comfyui import Resolution
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.prices import PriceTable

Json = dict[str, Any]


def listed(templates: Iterable[Template], prices: PriceTable, servers: Sequence[SeenServer]) -> list[Json]:
    """Each template by id; `servers` has numbers, no names: the caller is a tenant's service."""
    return [
        _described(template, prices) | {"servers": _counts(template, servers)}
        for template in sorted(templates, key=lambda template: template.template_id)
    ]


def servers_of(template: Template, servers: Sequence[SeenServer]) -> dict[str, str]:
    """For operators: server of the template's pool → `ok`, or what it lacks."""
    found = {}
    for server in servers:
        if server.pool != template.manifest.pool:
            continue
        report = server.report
        missing = report.unfit.get(template.template_id) if report else None
        if report is None or template.template_id in report.unknown:
            found[server.name] = "not known yet"
        elif missing is not None:
            found[server.name] = "; ".join(missing.reasons)
        else:
            found[server.name] = "sick" if server.is_sick else f"ok{_cold(report, template.template_id)}"
    return found


def _cold(report: ServerReport, template_id: str) -> str:
    if (reason := report.failed_warm_ups.get(template_id)) is not None:
        return f", but its warm-up failed: {reason}"
    return ", not warmed up yet" if template_id in report.cold else ""


def lines_of(row: Json) -> list[str]:
    """One template for a terminal; `servers` as in `servers_of`."""
    lines = [f"{row['template_id']}  ({row['scene']}, pool {row['pool']})  {row['summary']}"]
    for name, kind in row.get("inputs", {}).items():
        lines.append(f"  {name}: {kind}")
    for number, slot in enumerate(row.get("controls", [])):
        lines.append(f"  controls.{number}: {slot['kind'] or 'image'}{'' if slot['required'] else ', optional'}")
    for name, extra in row.get("extras", {}).items():
        limits = ", ".join(f"{key} {value}" for key, value in extra.items() if key not in ("type", "points"))
        lines.append(f"  extras.{name}: {extra['type']}{f' ({limits})' if limits else ''}, {_shown(extra['points'])}")
    if (loras := row.get("loras")) and loras["most"]:
        lines.append(f"  loras: at most {loras['most']}, {_shown(loras['points'])} each")
    if (images := row.get("images")) and images["most"] > 1:
        lines.append(f"  images: at most {images['most']}, each at the price of one")
    for name, setting in row.get("resolutions", {}).items():
        lines.append(f"  {name}: {_shown(setting['points'])}, about {setting['seconds']:g} s")
    for name, model in row.get("base_models", {}).items():
        lines.append(f"  base_model {name}: {_shown(model['points'])} beside {row['points']} points")
    if "hyperparameters" in row:
        lines.append(f"  hyperparameters: {', '.join(row['hyperparameters'])}")
    return lines + [f"  on {server}: {state}" for server, state in (row["servers"] or {"no server": "-"}).items()]


def _shown(points: int | None) -> str:
    return "no price: requests are refused" if points is None else f"{points} points"


def _counts(template: Template, servers: Sequence[SeenServer]) -> Json:
    of_pool = [server for server in servers if server.pool == template.manifest.pool]
    fit = [server for server in of_pool if server.can_run(template.template_id)]
    return {"total": len(of_pool), "fit": len(fit), "well": sum(not server.is_sick for server in fit)}


def _described(template: Template, prices: PriceTable) -> Json:
    manifest = template.manifest
    described: Json = {
        "template_id": manifest.template_id,
        "summary": manifest.summary,
        "scene": manifest.scene.value,
        "pool": manifest.pool,
    }
    if manifest.scene is Scene.MODEL_TRAIN:
        return described | _training(manifest, prices)
    return described | {
        "inputs": _inputs(manifest),
        "controls": [
            {"kind": slot.kind, "required": slot.required, "strength": slot.strength is not None}
            for slot in manifest.controls
        ],
        "extras": {
            name: _extra(extra) | {"points": prices.extras.get(name)} for name, extra in manifest.extras.items()
        },
        "loras": {"most": template.most_loras, "points": prices.lora},
        "images": {"most": manifest.images.limit},
        "resolutions": {
            name.value: {"seconds": setting.seconds, "points": _points(prices, name)}
            for name, setting in manifest.resolutions.items()
        },
        "accelerated_points": prices.image_accelerated,
    }


def _inputs(manifest: Manifest) -> dict[str, str]:
    """What a request may set beside `extras` and `controls` → its type."""
    inputs = manifest.inputs
    given = {
        "prompt": ("text", inputs.prompt),
        "negative_prompt": ("text", inputs.negative_prompt),
        "seed": ("integer", inputs.seed),
    }
    return {name: kind for name, (kind, refs) in given.items() if refs}


def _extra(extra: Extra) -> Json:
    if isinstance(extra, BooleanExtra):
        return {"type": "boolean"}
    if isinstance(extra, NumberExtra):
        return {"type": extra.type, "minimum": extra.minimum, "maximum": extra.maximum}
    if isinstance(extra, ChoiceExtra | AspectRatioExtra):
        return {"type": "choice", "choices": extra.choices}
    if isinstance(extra, FileExtra):
        return {"type": extra.type, "required": extra.required}
    return {"type": "text", "max_length": extra.max_length}


def _points(prices: PriceTable, resolution: Resolution) -> int:
    return prices.image(resolution=resolution.value, accelerated=False, extras={})


def _training(manifest: Manifest, prices: PriceTable) -> Json:
    training = manifest.training
    assert training is not None
    return {
        "base_models": {name: {"points": prices.base_models.get(name)} for name in training.base_models},
        "hyperparameters": ["batch_size", "epochs", "learning_rate", *sorted(training.inputs.hyperparameters)],
        "points": prices.training_base,
        "accelerated_points": prices.training_accelerated,
        "included_gpu_hours": prices.included_gpu_hours,
        "points_per_gpu_hour": prices.points_per_gpu_hour,
    }
