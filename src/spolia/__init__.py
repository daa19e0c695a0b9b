"""spolia: new ability out of trained models instead of raw data.

The public doors are imported when they are first used, so `import spolia` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_DOORS = {
    "merge": "spolia.runs.verbs",
    "list_methods": "spolia.runs.looking",
    "show": "spolia.runs.looking",
    "new": "spolia.runs.looking",
    "schema": "spolia.runs.looking",
    "doctor": "spolia.runs.looking",
    "demo": "spolia.runs.demo",
    "plan": "spolia.runs.verbs",
    "run": "spolia.runs.verbs",
    "sweep": "spolia.runs.sweep",
    "report": "spolia.runs.verbs",
    "ui": "spolia.runs.verbs",
    "serve": "spolia.runs.serve_experts",
    "import_model": "spolia.runs.importing",
    "masks": "spolia.runs.masking",
    "attach": "spolia.runs.masking",
    "merge_adapters": "spolia.runs.adapters",
    "surgery": "spolia.runs.surgery",
    "distill": "spolia.runs.distill",
    "meta": "spolia.runs.meta",
    "datafree": "spolia.runs.datafree",
    "link": "spolia.runs.link",
    "continual": "spolia.runs.continual",
    "save_prompts": "spolia.runs.prompted",
    "attach_prompts": "spolia.runs.prompted",
    "inspect": "spolia.runs.inspection",
    "compare": "spolia.runs.comparison",
    "evaluate": "spolia.runs.evaluation",
    "push": "spolia.runs.push",
    "load_recipe": "spolia.runs.recipe",
    "Recipe": "spolia.runs.recipe",
    "SpoliaError": "spolia.errors",
    "Journal": "spolia.core.journal",
    "Expert": "spolia.parts.expert",
    "ExpertPool": "spolia.parts.expert",
    "TaskVector": "spolia.parts.taskvector",
    "Network": "spolia.parts.network",
    "Adapters": "spolia.parts.bottleneck",
    "Examples": "spolia.parts.examples",
    "Learned": "spolia.parts.learned",
    "recipe_of": "spolia.runs.coefficients",
    "ClassSet": "spolia.parts.classes",
    "White": "spolia.parts.white",
    "WhitePool": "spolia.parts.white",
    "classifiers": "spolia.runs.classifiers",
    "EpisodeSampler": "spolia.parts.episode",
    "Inner": "spolia.core.inner",
    "Api": "spolia.parts.api",
}

if TYPE_CHECKING:
    from spolia.core.inner import Inner as Inner
    from spolia.core.journal import Journal as Journal
    from spolia.errors import SpoliaError as SpoliaError
    from spolia.parts.api import Api as Api
    from spolia.parts.bottleneck import Adapters as Adapters
    from spolia.parts.classes import ClassSet as ClassSet
    from spolia.parts.episode import EpisodeSampler as EpisodeSampler
    from spolia.parts.examples import Examples as Examples
    from spolia.parts.expert import Expert as Expert
    from spolia.parts.expert import ExpertPool as ExpertPool
    from spolia.parts.learned import Learned as Learned
    from spolia.parts.network import Network as Network
    from spolia.parts.taskvector import TaskVector as TaskVector
    from spolia.parts.white import White as White
    from spolia.parts.white import WhitePool as WhitePool
    from spolia.runs.adapters import merge_adapters as merge_adapters
    from spolia.runs.classifiers import classifiers as classifiers
    from spolia.runs.coefficients import recipe_of as recipe_of
    from spolia.runs.comparison import compare as compare
    from spolia.runs.continual import continual as continual
    from spolia.runs.datafree import datafree as datafree
    from spolia.runs.demo import demo as demo
    from spolia.runs.distill import distill as distill
    from spolia.runs.evaluation import evaluate as evaluate
    from spolia.runs.importing import import_model as import_model
    from spolia.runs.inspection import inspect as inspect
    from spolia.runs.link import link as link
    from spolia.runs.looking import doctor as doctor
    from spolia.runs.looking import list_methods as list_methods
    from spolia.runs.looking import new as new
    from spolia.runs.looking import schema as schema
    from spolia.runs.looking import show as show
    from spolia.runs.masking import attach as attach
    from spolia.runs.masking import masks as masks
    from spolia.runs.meta import meta as meta
    from spolia.runs.prompted import attach_prompts as attach_prompts
    from spolia.runs.prompted import save_prompts as save_prompts
    from spolia.runs.push import push as push
    from spolia.runs.recipe import Recipe as Recipe
    from spolia.runs.recipe import load_recipe as load_recipe
    from spolia.runs.serve_experts import serve as serve
    from spolia.runs.surgery import surgery as surgery
    from spolia.runs.sweep import sweep as sweep
    from spolia.runs.verbs import merge as merge
    from spolia.runs.verbs import plan as plan
    from spolia.runs.verbs import report as report
    from spolia.runs.verbs import run as run
    from spolia.runs.verbs import ui as ui

__all__ = ["__version__", *_DOORS]


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'spolia' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
