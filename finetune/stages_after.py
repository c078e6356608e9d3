"""What comes after the training: the model alone, an adapter merged into its base, and a Megatron checkpoint of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..storage.hashing import file_digest
from ..storage.manifest import MANIFEST_NAME
from .export import export, export_words, last_checkpoint, leave_model
from .job import Job, Step, command
from .stage_train import TrainStage
from .stages_before import WeightStages


class AfterStages:
    """Stages ``model`` and ``export``, found by the ledger of the output folder."""

    def __init__(self, job: Job, weights: WeightStages, training: TrainStage) -> None:
        self._job, self._weights, self._training = job, weights, training
        lora = job.args.model.use_lora
        self._leaves_model = job.saves and (job.run.export_hf or (lora and job.export is not None))
        if self._leaves_model and lora and job.start.model is None:
            raise ValueError(
                f"{job.args.model.model_name_or_path} is no folder, and its adapter is merged on files: download the model and "
                "name its folder, or give --export_hf false"
            )

    def plan(self) -> list[Step]:
        """The stages that this run has."""
        job = self._job
        checkpoint, model = job.output_dir / f"checkpoint-{job.step}", job.output_dir / f"hf-{job.step}"
        found: list[Step] = []
        if self._leaves_model:
            lora = job.args.model.use_lora
            words = ["--base_model_path", str(self._weights.folder), "--adapter_model_path", str(checkpoint)]
            words += ["--output_path", str(model), "--save_dtype", job.run.save_dtype or "DTYPE"]
            what = f"{checkpoint}{' merged into its base' * lora} -> {model}"
            found.append(
                self._step("model", what, self._model_inputs, self._model, command("merge", words) if lora else "")
            )
        if job.export:
            output = job.output_dir / f"mcore-{job.step}"
            source = model if self._leaves_model else checkpoint
            words = [
                "--to",
                "mcore",
                "--load",
                str(source),
                "--save",
                str(output),
                *export_words(str(job.run.export_mcore)),
            ]
            what = f"{source} -> {output} ({job.run.export_mcore})"
            found.append(self._step("export", what, self._export_inputs, self._export, command("convert", words)))
        return found

    def _step(
        self,
        stage: str,
        what: str,
        inputs: Callable[[], dict[str, Any]],
        make: Callable[[Path, int], Path],
        command_line: str,
    ) -> Step:
        job = self._job

        def do() -> None:
            if (standing := job.ledger.look(stage, inputs())).artifact:
                job.say(f"{stage}: reused {standing.artifact}")
                return
            job.ledger.done(stage, inputs(), make(*last_checkpoint(job.output_dir)))

        return Step(stage, what, job.ledger.look(stage, inputs()).artifact is not None, do, command_line)

    def _model_inputs(self) -> dict[str, Any]:
        """Of a training that is not done nothing is known, which is no artifact's inputs."""
        trained = self._training.look().artifact
        digest = file_digest(trained / MANIFEST_NAME) if trained else None
        return {"checkpoint": digest, "base": self._weights.key, "save_dtype": self._job.run.save_dtype}

    def _model(self, checkpoint: Path, step: int) -> Path:
        job, output = self._job, self._job.output_dir / f"hf-{step}"
        base = self._weights.folder if job.args.model.use_lora else None
        leave_model(checkpoint, base, output, job.run.save_dtype, job.say)
        return output

    def _export_inputs(self) -> dict[str, Any]:
        return {**self._model_inputs(), "export_mcore": self._job.run.export_mcore}

    def _export(self, checkpoint: Path, step: int) -> Path:
        job, output = self._job, self._job.output_dir / f"mcore-{step}"
        assert job.export is not None
        source = job.output_dir / f"hf-{step}" if self._leaves_model else checkpoint
        export(job.export, source, output, step, job.say)
        return output
