"""The data of a folder pool's tasks as Examples: arrays as they are, texts by the expert's tokenizer, images by its look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.data import images, pictures, tables
from spolia.errors import Problems, SpoliaError
from spolia.parts.examples import Examples
from spolia.runs.schema import DataPart, TaskData
from spolia.runs.taskdata import Known, check_part, class_numbers, coded

if TYPE_CHECKING:
    from torch import Tensor

Loaded = tuple[dict[str, Examples], dict[str, Examples]]  # unlabelled and test, by task


def load_tasks(tasks: Mapping[str, TaskData], known: Mapping[str, Known], labels: bool) -> Loaded:
    """Inputs to adapt on and to test on, in the order of `tasks`. `labels`: those of the former are asked for too.

    Raises SpoliaError with everything that is wrong.
    """
    problems, unlabelled, test = Problems(), dict[str, Examples](), dict[str, Examples]()
    for name, task in tasks.items():
        reader = _Reader(name, task, known[name])
        asked = ((unlabelled, "unlabelled", labels), (test, "test", not known[name].language))
        for found, key, labelled in asked:
            part = getattr(task, key)
            if part is None:
                continue
            try:
                check_part(part, task, known[name], labelled)
                found[name] = reader.read(part, labelled)
            except SpoliaError as error:
                for problem in error.problems:
                    place = Path(problem.where or part.path or part.dataset or "").name
                    problems.add(f"pool.tasks.{name}.{key}", f"{place}: {problem.what}", problem.mend)
    problems.raise_if_any()
    return unlabelled, test


@dataclass(frozen=True)
class _Reader:
    name: str
    task: TaskData
    known: Known

    def read(self, part: DataPart, labelled: bool) -> Examples:
        if part.dataset is not None:
            return self._dataset(part, labelled)
        assert part.path is not None
        match tables.kind_of(part.path):
            case "arrays":
                return self._arrays(part, part.path, labelled)
            case "table":
                return self._table(part, part.path, labelled)
        files = pictures.classes_in(part.path)
        order = class_numbers(list(files), self.task, self.known) if labelled else [0] * len(files)
        pairs = [(file, place) for place, group in zip(order, files.values(), strict=True) for file in group]
        pairs = pairs[: part.most]
        values = pictures.Pictures([file for file, _ in pairs], self.look)
        return Examples(values, _tensor([place for _, place in pairs]) if labelled else None, name=self.name)

    @property
    def look(self) -> pictures.Look:
        if self.known.extent is None and self.known.look is None:
            what = "images are given, and the model's config says no image_size"
            raise SpoliaError(what, mend="give the inputs as an npz file, as the model takes them")
        extent = self.known.extent or (224, 224)
        return pictures.Look.of(self.known.look, extent, self.known.channels or 3)

    def _arrays(self, part: DataPart, file: Path, labelled: bool) -> Examples:
        heads = tables.array_heads(file)
        if coded(heads, part.split):
            held = images.read_part(file, str(part.split), part.most)
            sized = images.resized(held.pixels, self.look.size[0])
            return Examples(self.look.values(sized), _labels(held.labels, self) if labelled else None, name=self.name)
        names = tables.named_arrays(list(heads), self.task.inputs, part.split)
        read = tables.read_arrays(file, names, part.most)
        labels = None
        if labelled:
            label = tables.named_labels(list(heads), self.task.labels, part.split, "array")
            labels = _labels(tables.read_arrays(file, [label], part.most)[label], self)
        end = f"_{part.split}" if part.split else ""
        values = {name.removesuffix(end) if end else name: self._input(array) for name, array in read.items()}
        if self.known.language and len(values) == 1:
            return Examples({"input_ids": self._windows(next(iter(values.values())))}, name=self.name)
        tokens = "input_ids" in values or len(values) > 1
        return Examples(values if tokens else next(iter(values.values())), labels, name=self.name)

    def _input(self, array: np.ndarray) -> Tensor:
        if array.dtype == np.uint8 and array.ndim in (3, 4) and self.known.extent is not None:
            pixels = array[:, None] if array.ndim == 3 else array
            if pixels.shape[1] == 1 and (self.known.channels or 3) == 3:
                pixels = np.repeat(pixels, 3, 1)
            return self.look.values(np.ascontiguousarray(pixels))
        if np.issubdtype(array.dtype, np.integer):
            return torch.from_numpy(array.astype(np.int64))
        if not np.issubdtype(array.dtype, np.floating):
            raise SpoliaError(f"holds {array.dtype}, no numbers", mend="give floats, pixels or token ids")
        return torch.from_numpy(array.astype(np.float32))

    def _table(self, part: DataPart, file: Path, labelled: bool) -> Examples:
        held = tables.columns(file)
        names = tables.named_texts(held, self.task.inputs)
        label = tables.named_labels(held, self.task.labels, None, "column") if labelled else None
        read = tables.read_columns(file, [*names, *([label] if label else [])], part.split, part.most)
        return self._texts([read[name] for name in names], _labels(read[label], self) if label else None)

    def _texts(self, columns: list[list[str]], labels: Tensor | None) -> Examples:
        """One column of texts, or two of pairs, as token ids."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise SpoliaError("texts need transformers", mend="pip install 'spolia[llm]'") from None
        try:
            kept: Any = AutoTokenizer
            tokenizer = kept.from_pretrained(self.known.folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            said = " ".join(str(error).split())[:160]
            raise SpoliaError(f"its tokenizer cannot be opened: {said}", where=str(self.known.folder)) from None
        if self.known.language:
            ids = tokenizer("\n".join(columns[0]), return_tensors="pt", verbose=False)["input_ids"][0]
            return Examples({"input_ids": self._windows(ids)}, name=self.name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        given = [[str(text) for text in column] for column in columns]
        found = tokenizer(*given, truncation=True, max_length=self.task.length, padding=True, return_tensors="pt")
        return Examples(dict(found), labels, name=self.name)

    def _windows(self, ids: Tensor) -> Tensor:
        """Token ids in whole windows [windows, length]; a matrix stays as it is."""
        if ids.ndim == 2:
            return ids
        count = len(ids) // self.task.length
        if not count:
            what = f"{len(ids)} tokens make no window of {self.task.length}"
            raise SpoliaError(what, mend="give a longer text, or a smaller `length`")
        return ids[: count * self.task.length].view(count, self.task.length)

    def _dataset(self, part: DataPart, labelled: bool) -> Examples:
        rows = tables.read_dataset(str(part.dataset), part.config, part.split)
        held = list(rows.column_names)
        rows = rows.select(range(min(part.most, len(rows)))) if part.most else rows
        picture = next((name for name in ("image", "img", "pixel_values") if name in held), None)
        label = tables.named_labels(held, self.task.labels, None, "column") if labelled else None
        labels = _labels(list(rows[label]), self) if label else None
        if picture is not None and self.task.inputs is None:
            shown = torch.stack([self.look.shown(image) for image in rows[picture]])
            return Examples(shown, labels, name=self.name)
        return self._texts([list(rows[name]) for name in tables.named_texts(held, self.task.inputs)], labels)


def _labels(values: Any, reader: _Reader) -> Tensor:
    return _tensor(class_numbers(values, reader.task, reader.known))


def _tensor(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)
