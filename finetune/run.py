"""The whole way in one command: weights and raw data to a trained and exported model, each stage once.

    finebridge run recipe.yaml [key=value ...] [--flag value ...]

Stages: ``weights`` (a Megatron checkpoint becomes Hugging Face's) or ``mcore`` (``--enable_hf2mg_convert``: the other way,
for Megatron's own jobs), ``data`` (raw rows to tokens), ``tokens`` (``--output_prefix``), ``train``, ``model`` (the trained
model alone, LoRA merged) and ``export`` (as a Megatron checkpoint). All are planned, and bad input is told, before the first
one begins. A stage whose artifact stands for exactly these inputs is not done again.
"""

from collections.abc import Sequence

from ..storage.once import locked
from ..storage.space import free_bytes
from .export import check_export, export_last
from .job import Job, Step, size
from .recipe import gather, to_argv
from .stage_train import TrainStage
from .stages_after import AfterStages
from .stages_before import DataStages, WeightStages, asked_pack

# Seconds without a heartbeat after which a launcher elsewhere is taken for dead. Longer than for what is built once: of two
# that build, one drops its work, but two trainings in a folder would spoil it, and a disk on the network may pause.
_DEAD = 120.0


def run(words: Sequence[str]) -> int:
    """Say the plan of all stages and do them; the exit code is that of the stage that failed."""
    values = gather(words)
    pack = asked_pack(values)
    job = Job(values, "run")
    weights = WeightStages(job)
    data = DataStages(job, pack)
    training = TrainStage(job, weights, data)
    before = [*weights.plan(), *data.plan()]
    trained = training.plan()
    after = [*data.plan_tokens(), trained, *AfterStages(job, weights, training).plan()]
    for step in (*before, *after):
        job.say(str(step))
    if job.run.dry_run:
        job.say(f"plan: {size(free_bytes(job.output_dir))} are free where {job.output_dir} lies")
        return job.start_ranks(to_argv(job.values)) if job.where.remote else 0  # which shows how they would be
    only = job.where.preflight == "only"
    code = job.preflight() if only or not trained.stands else 0
    if code or only:
        return code
    return _work(job, before, trained, after)


def _work(job: Job, before: Sequence[Step], training: Step, after: Sequence[Step]) -> int:
    """Do the stages; an output folder is one launcher's at a time, the others wait and find the work done.

    Of nodes that are started by hand each prepares what it needs and trains; all else is the first one's.
    """
    for step in before:
        if code := step.do():  # also where it stands: then it is verified
            return code
    if not job.where.leads:
        return training.do() or 0
    with locked(job.output_dir / ".run.lock", job.say, dead=_DEAD) as tell:
        for step in after:
            tell.note(f"{step.stage}, {step.what}")
            if code := step.do():
                return code
    return 0


def train(verb: str, words: Sequence[str]) -> int:
    """The training alone, with the Megatron checkpoints at its ends that its flags name; the exit code of the ranks."""
    job = Job(gather(words), verb)
    if job.run.dry_run:
        return job.start_ranks(to_argv(job.values))
    if job.start.megatron and (code := job.preflight()):  # before the conversion; else it comes just before the ranks
        return code
    if job.where.preflight == "only":
        return job.start_ranks(to_argv(job.values))
    folder = job.start.make(job.say)
    if job.start.megatron:
        job.values.pop("load", None)
        job.values["model_name_or_path"] = str(folder)
    if job.export and folder:
        check_export(job.export, folder)
    elif job.export:
        job.say("export: no folder holds the model yet, so the export is planned when it is trained")
    code = job.start_ranks(to_argv(job.values))
    if code == 0 and job.export and job.where.leads:
        export_last(job.export, folder, job.output_dir, job.say)
    return code
