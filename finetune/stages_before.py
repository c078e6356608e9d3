"""What comes before the training: weights that the trainer reads, Megatron's for other jobs, and data as tokens.

All of it lies under a hash of its inputs and is made once by whoever comes first (``storage.once``).
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from ..bridge.convert_cli import kept_conversion
from ..data_tools.arguments import DataArguments
from ..data_tools.build import export_tokens
from ..data_tools.filters import unfiltered
from ..data_tools.mixture import mixture_file
from ..data_tools.mixture_index import MixturePlan, plan_mixture, prepare_mixture
from ..data_tools.preprocess import Preparation, plan, prepare
from ..data_tools.token_files import token_prefix
from ..data_tools.tokenizer_files import TokenizerSource
from ..data_tools.workers import StartMethod
from ..storage.hashing import file_digest
from ..storage.manifest import MANIFEST_NAME, ManifestError, read
from ..storage.source_hashes import source_sha256
from .export import check_export
from .job import Job, Step, command, size
from .resolved import recipe_text
from .weights import identity, tokenizer_folder

Pack = Literal["none", "pack", "neat"]
_YES = ("true", "1", "yes", True)
# Flags of data build that a training run names otherwise or does not pass on.
_NOT_BUILD = {
    "train_data_file",
    "eval_data_file",
    "prepared_data_dir",
    "packing",
    "use_dummy_data",
    "model_size",
    "complex_data",
}


class WeightStages:
    """Stages ``weights`` and ``mcore``."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @cached_property
    def key(self) -> str:
        """A hash of the weights that the run starts from; of a name on the Hub or a model type the name."""
        start, model = self._job.start, self._job.args.model
        if start.megatron:
            return start.key(self._job.say)
        if start.model:
            return identity(start.model, self._job.cache, self._job.say)
        path = Path(str(model.config_name))
        return file_digest(path) if model.config_name and path.is_file() else str(model.model_name_or_path or path)

    @cached_property
    def folder(self) -> Path | None:
        """The Hugging Face folder that the ranks load; None for a new model or a name on the Hub."""
        return self._job.start.folder(self._job.say)

    def plan(self) -> list[Step]:
        """The stages that this run has. Raises ValueError."""
        job = self._job
        if job.export and self.folder and self.folder.exists():
            check_export(job.export, self.folder)
        if job.run.enable_hf2mg_convert:
            return [self._mcore()]
        return [self._weights()] if job.start.megatron else []

    def _weights(self) -> Step:
        start, target = self._job.start, self.folder
        assert target is not None
        words = ["--to", "hf", "--load", str(start.model), "--save", str(target)]
        words += ["--hf_config", str(start.config)] if start.config else []
        what = f"{start.model} (Megatron, {size(_bytes(start.model))}) -> {target}"
        return Step("weights", what, _stands(target), self._convert, command("convert", words))

    def _convert(self) -> None:
        job = self._job
        folder = job.start.make(job.say)
        assert folder is not None
        job.note_done(folder, recipe_text(job.run, job.args))
        if job.export:
            check_export(job.export, folder)

    def _mcore(self) -> Step:
        job = self._job
        words = job.run.convert_words(str(job.start.model))
        kept = kept_conversion(words)

        def make() -> None:
            kept.make(lambda line: job.say(f"mcore: {line}"))
            job.note_done(kept.save, recipe_text(job.run, job.args))

        what = f"{job.start.model} ({size(_bytes(job.start.model))}) -> {kept.save}"
        return Step("mcore", what, kept.stands(job.say), make, command("convert", words))


class DataStages:
    """Stages ``data``, once for training and once for evaluation data, and ``tokens``, which is the output folder's own."""

    def __init__(self, job: Job, pack: Pack) -> None:
        self._job = job
        self._pack: Pack = pack

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Flag -> a hash of what it names and of all that shapes its tokens. Raises DataError."""
        job, found = self._job, dict[str, Any]()
        for flag, planned in self._raw.items():
            found[flag] = file_digest(planned.target / MANIFEST_NAME) if planned.named else planned.target.name
        found |= {flag: planned.target.name for flag, planned in self._mixtures.items()}
        for flag, prefix in self._token_files.items():
            files = [prefix.with_name(f"{prefix.name}{ending}") for ending in (".bin", ".idx")]
            found[flag] = list(source_sha256(files, job.cache, job.say).values())
        return found

    def plan(self) -> list[Step]:
        """Stages ``data``. Raises DataError."""
        found = [self._data(flag, [self._named[flag]], planned) for flag, planned in self._raw.items()]
        for flag, mixed in self._mixtures.items():
            sources = zip(mixed.mixture.sources, mixed.parts, strict=True)
            found += [self._data(flag, source.paths, planned) for source, planned in sources]
            found.append(self._index(flag, mixed))
        prefixes = self._token_files.values()
        return found + [Step("data", f"{prefix}.bin, tokens already", True, lambda: None) for prefix in prefixes]

    def plan_tokens(self) -> list[Step]:
        """Stage ``tokens``, where it is asked for. Raises DataError, ValueError."""
        return [self._tokens(self._job.run.output_prefix)] if self._job.run.output_prefix else []

    @cached_property
    def _tokenizer(self) -> TokenizerSource:
        model, start = self._job.args.model, self._job.start
        beside = tokenizer_folder(start) if start.megatron else None
        where = model.tokenizer_name_or_path or beside or model.model_name_or_path
        return TokenizerSource(str(where), model.trust_remote_code, model.cache_dir)

    @cached_property
    def _named(self) -> dict[str, str]:
        data = self._job.args.data
        names = {"train_data_file": data.train_data_file, "eval_data_file": data.eval_data_file}
        return {flag: name for flag, name in names.items() if name}

    @cached_property
    def _token_files(self) -> dict[str, Path]:
        if self._job.args.kind != "document":
            return {}
        return {flag: prefix for flag, name in self._named.items() if (prefix := token_prefix(name))}

    @cached_property
    def _raw(self) -> dict[str, Preparation]:
        job = self._job
        return {
            flag: plan([name], self._tokenizer, self._flags(flag), job.cache, job.say, job.args.kind)
            for flag, name in self._named.items()
            if flag not in self._token_files and not mixture_file(name)
        }

    @cached_property
    def _mixtures(self) -> dict[str, MixturePlan]:
        job = self._job
        return {
            flag: plan_mixture(file, self._tokenizer, self._flags(flag), job.cache, job.say, job.args.kind)
            for flag, name in self._named.items()
            if (file := mixture_file(name))
        }

    def _flags(self, flag: str) -> DataArguments:
        data = self._job.args.data
        return data if flag == "train_data_file" else unfiltered(data)

    def _index(self, flag: str, planned: MixturePlan) -> Step:
        """The index of a mixture; it makes what of the sources is not there yet, too."""
        job, file = self._job, planned.mixture.file
        words = [str(file), *self._words(flag)]

        def make() -> None:
            prepare_mixture(file, self._tokenizer, self._flags(flag), job.cache, job.say, self._method, job.args.kind)
            job.note_done(planned.target, recipe_text(job.run, job.args))

        what = f"{file}, {len(planned.parts)} sources -> {planned.target}"
        return Step("data", what, _stands(planned.target), make, command("data build", words))

    def _words(self, flag: str) -> list[str]:
        """The flags of data build that stand for this run's."""
        words = ["--tokenizer_name_or_path", self._tokenizer.path, "--output_dir", str(self._job.cache)]
        for entry in fields(DataArguments):
            value = getattr(self._flags(flag), entry.name)
            if entry.name not in _NOT_BUILD and value != entry.default:
                words += [f"--{entry.name}", *([] if value is True else [str(value)])]
        return words

    def _data(self, flag: str, names: Sequence[str], planned: Preparation) -> Step:
        if planned.named:
            return Step("data", f"{planned.target}, prepared already", True, lambda: None)
        bytes_ = sum(file.stat().st_size for file in planned.files)
        what = f"{', '.join(names)} ({size(bytes_)}) -> {planned.target}"
        make = partial(self._prepare, flag, names)
        return Step("data", what, _stands(planned.target), make, command("data build", [*names, *self._words(flag)]))

    @property
    def _method(self) -> StartMethod:
        converted = self._job.start.megatron or self._job.run.enable_hf2mg_convert
        return "spawn" if converted else "fork"  # torch has threads by then, which a fork may not survive

    def _prepare(self, flag: str, names: Sequence[str]) -> None:
        job = self._job
        folder = prepare(names, self._tokenizer, self._flags(flag), job.cache, job.say, self._method, job.args.kind)
        job.note_done(folder, recipe_text(job.run, job.args))

    def _tokens(self, prefix: str) -> Step:
        job, planned = self._job, self._raw.get("train_data_file")
        if planned is None:
            what = "a mixture" if "train_data_file" in self._mixtures else "token files already"
            raise ValueError(f"--output_prefix is for raw data; --train_data_file names {what}")
        limited = bool({"max_seq_length", "seq_length", "over_long"} & set(job.values))
        shaped = [job.args.data.max_seq_length, job.args.data.over_long] if limited or self._pack != "none" else []
        inputs = {
            "data": self.keys["train_data_file"],
            "prefix": str(Path(prefix).absolute()),
            "pack": self._pack,
            "shaped": shaped,
        }

        def write() -> None:
            if job.ledger.look("tokens", inputs).artifact:
                job.say(f"tokens: reused {prefix}_*")
                return
            if job.ledger.inputs("tokens").get("prefix") != inputs["prefix"] and (
                there := _token_files_of(Path(prefix))
            ):
                raise ValueError(
                    f"--output_prefix {prefix}: {there[0]} is there, and not of this run; name another prefix"
                )
            job.ledger.begin("tokens", inputs)  # from here on what lies there is ours, however this ends
            files = export_tokens(
                planned.target, prefix, self._tokenizer, job.args.data, pack=self._pack, limited=limited, replace=True
            )
            job.ledger.done("tokens", inputs, Path(prefix), files)

        standing = job.ledger.look("tokens", inputs)
        return Step("tokens", f"{planned.target} -> {prefix}_*", standing.artifact is not None, write)


def asked_pack(values: dict[str, Any]) -> Pack:
    """How the files of ``--output_prefix`` are packed, by MindSpeed-LLM's flags among raw values."""
    if values.get("neat_pack") in _YES or values.get("packing") in _YES:
        return "neat"
    return "pack" if values.get("pack") in _YES else "none"


def _token_files_of(prefix: Path) -> list[Path]:
    """The token files whose names begin with a prefix."""
    beside = prefix.parent.iterdir() if prefix.parent.is_dir() else ()
    return sorted(
        path for path in beside if path.name.startswith(f"{prefix.name}_") and path.suffix in (".bin", ".idx")
    )


def _stands(target: Path) -> bool:
    """Whether an artifact under a hash of its inputs is there and looks whole; who uses it verifies it."""
    try:
        read(target)
    except (ManifestError, NotADirectoryError):
        return False
    return True


def _bytes(folder: Path | None) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
