"""A run by several processes, as torchrun or `--nproc` starts them: all go through the same study, the first writes.

A loop whose steps the processes share is made by all; any other by the first alone, whose end the others take up. What
the others write goes to a copy of the run folder that ends with them.
"""

from __future__ import annotations

import json
import shutil
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from spolia.core.dist import anyone, asked, first_error, joined, told, world
from spolia.core.journal import Interrupted, Journal, Progress
from spolia.errors import Problem, SpoliaError, ToldElsewhere
from spolia.runs.recipe import Recipe
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

_APART = (".lock", "loops", "metrics.jsonl", "log.txt", "report.html")  # the first process's own
_ALONE = {  # learners of the family that one process has to itself
    "apis": "APIs are asked from one process",
    "ncm": "class means take no steps",
}
_SILENT = "another process of this run ended without a word"


@contextmanager
def as_one(nproc: int = 1, dry_run: bool = False) -> Iterator[int]:
    """Inside, the processes that torchrun started are one run: nobody leaves before the first, an error is told once.

    Yields this process's rank. What a person asks of it: more processes, a trial.
    """
    if asked()[1] == 1:
        yield 0
        return
    with joined() as (rank, _), warnings.catch_warnings():
        if rank:
            warnings.simplefilter("ignore")  # the first process says it
        try:
            if nproc > 1:
                what = "torchrun has started several processes already"
                raise SpoliaError(what, where="nproc", mend="leave out one of the two")
            if dry_run:
                raise SpoliaError("a dry run is one process's", where="dry_run", mend="run it without torchrun")
            yield rank
            told()
        except Interrupted:
            told()  # the first has saved and told what there is
            raise
        except Exception as error:
            raise _settled(error, rank) from error


@contextmanager
def begun(folder: RunFolder, recipe: str, fresh: bool) -> Iterator[RunFolder]:
    """The folder, made that of `recipe`; for all processes but the first what they are to take for it."""
    rank, ranks = world()
    if rank:
        told()
        with Shadow(folder.path) as shadow:
            anyone(False)
            yield shadow
        return
    with folder:
        folder.begin(recipe, fresh=fresh)
        if ranks > 1:
            told()
            anyone(False)  # it is changed when all have their copy
        yield folder


class Shadow(RunFolder):
    """A copy of a run folder, in which other processes than the first write what nobody reads."""

    leads = False

    def __init__(self, original: Path):
        self.original = original.resolve()
        self._place = TemporaryDirectory(prefix="spolia-")
        super().__init__(self._place.name)

    def __enter__(self) -> Shadow:
        shutil.copytree(
            self.original,
            self.path,
            ignore=shutil.ignore_patterns(*_APART),
            copy_function=_copied,
            dirs_exist_ok=True,
        )
        self.checkpoints.mkdir(exist_ok=True)  # which the first process's journal makes there
        return self

    def __exit__(self, *_: object) -> None:
        self._place.cleanup()

    def journal(self, progress: Progress | None = None) -> Journal:
        """The first process's, followed in silence."""
        return Journal(self.original, follow=True, together=True)


def _copied(source: str, target: str) -> None:
    """Small files as they are now; tensors stay where they are."""
    if source.endswith(".safetensors"):
        Path(target).symlink_to(source)
    else:
        shutil.copyfile(source, target)


def check_shares(recipe: Recipe | StudyRecipe, count: int) -> None:
    """SpoliaError where `count` processes would find nothing to share in the recipe."""
    if count == 1 or (why := _nothing_to_share(recipe)) is None:
        return
    mend = "run it without --nproc or torchrun"
    if isinstance(recipe, Recipe) and not isinstance(recipe, StudyRecipe):
        mend += "; `spolia merge RECIPE OUT --share` shares the merge of large models"
    raise SpoliaError(
        f"{why}: {count} processes have nothing to share", where=f"method {recipe.method.name}", mend=mend
    )


def _nothing_to_share(recipe: Recipe | StudyRecipe) -> str | None:
    name = recipe.method.name
    if isinstance(recipe, StudyRecipe):
        if recipe.family == "link":
            return None if name == "deepsc" else "nothing is trained but small models of text"
        return _ALONE.get(name)
    if recipe.repair[0].family == "surgery" or recipe.method.data:
        return None
    return "this merge looks at no inputs and takes no steps"


# --- errors ----------------------------------------------------------------------------------------------------------


def packed(error: Exception, rank: int) -> str:
    """An error as text for other processes."""
    if isinstance(error, SpoliaError):
        return json.dumps({"rank": rank, "problems": [[p.where, p.what, p.mend] for p in error.problems]})
    trace = "".join(traceback.format_exception(error))
    return json.dumps({"rank": rank, "crash": f"{type(error).__name__}: {error}", "trace": trace})


def unpacked(text: str) -> Exception:
    """The error that `packed` was given."""
    held = json.loads(text)
    if "problems" in held:
        return SpoliaError(problems=[Problem(*parts) for parts in held["problems"]])
    error = RuntimeError(f"{held['crash']} (in process {held['rank']})")
    error.add_note(held["trace"])
    return error


def _settled(error: Exception, rank: int) -> Exception:
    """This process's own error where no other came before it, else that one."""
    if _is_broken_connection(error):
        mend = "if memory ran out, take fewer processes or smaller batches; the same command goes on"
        error = SpoliaError(_SILENT, where=f"process {rank}", mend=mend)
    own = packed(error, rank)
    try:
        first = first_error(own)
    except RuntimeError:  # whoever kept the errors is gone
        return ToldElsewhere(str(error))
    if first == own:
        return error
    other = unpacked(first)
    return ToldElsewhere(problems=other.problems) if isinstance(other, SpoliaError) else ToldElsewhere(str(other))


def _is_broken_connection(error: Exception) -> bool:
    """Whether it says no more than that another process is gone."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in said for word in ("gloo", "nccl", "connection"))


def message_of(error: BaseException) -> str:
    """What a run's status says of the error that ended it."""
    if isinstance(error, Exception) and world()[1] > 1 and _is_broken_connection(error):
        return _SILENT
    return f"{type(error).__name__}: {error}"[:300]
