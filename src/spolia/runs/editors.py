"""The JSON Schema of recipes, for completion and checking in editors."""

from __future__ import annotations

from typing import Any

from spolia.catalog import METHODS
from spolia.methods.merge.preprocess import STEPS
from spolia.runs.schema import POOLS, VERSION, Head
from spolia.runs.studies import STUDIES, module_of


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for completion and checking in editors."""
    schema = Head.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for model in POOLS.values():
        schema_of_pool = model.model_json_schema()
        definitions.update(schema_of_pool.pop("$defs", {}))
        definitions[model.__name__] = schema_of_pool
    methods = []
    for method in METHODS:
        settings = method.settings_class().model_json_schema()
        definitions.update(settings.pop("$defs", {}))
        names = {"enum": [method.name, *method.aliases], "description": method.summary}
        settings["properties"] = {"name": names, **settings.get("properties", {})}
        settings["required"] = ["name", *settings.get("required", [])]
        definitions[f"{method.family}/{method.name}"] = settings | {"title": method.name, "description": method.summary}
        methods.append({"$ref": f"#/$defs/{method.family}~1{method.name}"})
    schema["properties"]["spolia"]["const"] = VERSION
    shapes = {model.__name__: model for family in STUDIES for model in module_of(family).PROBLEMS.values()}
    for name, model in shapes.items():
        shape = model.model_json_schema()
        definitions.update(shape.pop("$defs", {}))
        definitions[name] = shape
    if shapes:
        problem = {"description": "of families without a pool: what the method works on and is judged by"}
        schema["properties"]["problem"] = problem | {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in shapes]}
    schema["required"] = [name for name in schema["required"] if name != "pool"]
    schema["oneOf"] = [{"required": ["pool"]}, {"required": ["problem"]}]
    schema["properties"]["pool"] = {"anyOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in POOLS.values()]}
    schema["properties"]["method"] = {"anyOf": methods}
    repairs = [one for one in methods if one["$ref"].startswith("#/$defs/surgery~1")]
    schema["properties"]["surgery"] = {"anyOf": repairs}
    steps: list[dict[str, Any]] = [{"enum": list(STEPS)}]
    for name, kind in STEPS.items():
        shape = kind.model_json_schema()
        steps.append(shape | {"properties": {"name": {"const": name}, **shape["properties"]}, "required": ["name"]})
    schema["properties"]["preprocess"] = {"type": "array", "items": {"anyOf": steps}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "spolia recipe"}
