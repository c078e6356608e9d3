"""The stage ``train``: not done again for the same inputs, gone on with when it was stopped, never mixed with another run."""

from functools import cached_property
from pathlib import Path
from typing import Any

from ..storage.manifest import steps
from ..storage.once import forget
from ..storage.publish import remove, write_text
from ..train.record import command_line
from .export import last_checkpoint
from .job import Job, Step
from .ledger import Standing
from .recipe import to_argv
from .resolved import recipe_text
from .shaping import shaping_flags
from .stages_before import DataStages, WeightStages
from .weights import identity

_STAGE = "train"


class TrainStage:
    """The ranks' work. ``inputs`` is all that shapes what they learn: hashes of data and weights, and the flags."""

    def __init__(self, job: Job, weights: WeightStages, data: DataStages) -> None:
        self._job, self._weights, self._data = job, weights, data

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Name -> hash or value. Raises ValueError."""
        job = self._job
        found: dict[str, Any] = {
            "trained on": job.verb,
            "ranks": job.ranks,
            **self._data.keys,
            "weights": self._weights.key,
        }
        if job.args.data.use_dummy_data:  # else it is in the data's key
            found["tokenizer"] = job.args.model.tokenizer_name_or_path
        if job.args.model.init_from_checkpoint:
            found["init"] = identity(Path(job.args.model.init_from_checkpoint), job.cache, job.say)
        return found | shaping_flags(job.args)

    def look(self) -> Standing:
        """What the ledger says of it."""
        return self._job.ledger.look(_STAGE, self.inputs)

    def plan(self) -> Step:
        """The stage. Raises ValueError when the output folder holds another run."""
        job, standing = self._job, self.look()
        self._refuse_other_run(standing)
        what = f"{job.verb}, {job.ranks} rank{'s' * (job.ranks > 1)}"
        what += f" -> {standing.artifact or job.output_dir / f'checkpoint-{job.step}'}"
        if standing.artifact is None and standing.begun and self._goes_on:
            what += ", from the newest checkpoint on"
        words = [*([] if job.where.remote else [f"--nproc_per_node={job.ranks}"]), *self._argv(standing)]
        return Step(_STAGE, what, standing.artifact is not None, self._do, command_line(words, job.verb))

    @property
    def _goes_on(self) -> bool:
        """Whether a stopped run goes on: its checkpoints hold all state, and nobody said otherwise."""
        return not self._job.args.hf.get("save_only_model") and "resume_from_checkpoint" not in self._job.values

    def _argv(self, standing: Standing) -> list[str]:
        values = dict(self._job.values)
        if standing.begun and self._goes_on:
            values["resume_from_checkpoint"] = "true"
            if values.pop("init_from_checkpoint", None):  # of a new run it says what this one's checkpoint says
                values |= self._job.told_by_init
        if self._job.start.megatron:
            for other in ("load", "model_name_or_path"):
                values.pop(other, None)
            values["model_name_or_path"] = str(self._weights.folder)
        return to_argv(values)

    def _made_here(self) -> list[Path]:
        """What a run left in the output folder: checkpoints, and what was made of them."""
        job = self._job
        left = [path for path in job.ledger.artifacts() if path.parent == job.output_dir and path.is_dir()]
        return list(dict.fromkeys([*(folder for _, folder in steps(job.output_dir)), *left]))

    def _refuse_other_run(self, standing: Standing) -> None:
        job = self._job
        there = self._made_here()
        asked = job.args.hf.get("resume_from_checkpoint") or job.run.overwrite_output_dir
        if standing.artifact or standing.begun or not there or asked:
            return
        why = standing.why or "finebridge run did not make it"
        raise ValueError(
            f"--output_dir {job.output_dir} holds {there[0].name} of another run ({why}). Choose another --output_dir, go on "
            "from it with --resume_from_checkpoint true, or have what it left there removed by --overwrite_output_dir"
        )

    def _do(self) -> int:
        job, standing = self._job, self.look()
        if standing.artifact:
            job.say(f"train: reused {standing.artifact}; remove it to train again")
            return 0
        if not job.where.leads:  # the first node's process does what is done once a run
            return job.start_ranks(self._argv(standing))
        self._refuse_other_run(standing)  # it may have come meanwhile
        if job.run.overwrite_output_dir and not standing.begun and not job.args.hf.get("resume_from_checkpoint"):
            for folder in self._made_here():
                job.say(f"train: removing {folder} of another run (--overwrite_output_dir)")
                remove(folder)
                forget(folder)
        write_text(job.output_dir / "recipe.yaml", recipe_text(job.run, job.args))
        job.ledger.begin(_STAGE, self.inputs)
        code = job.start_ranks(self._argv(standing))
        if code == 0 and job.saves:
            job.ledger.done(_STAGE, self.inputs, last_checkpoint(job.output_dir)[0])
        return code
