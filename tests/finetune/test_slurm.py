"""What Slurm says of an allocation."""

import pytest
from finebridge.finetune.slurm import MOST_NODES, SlurmError, expand, nodes, slots_by_node, task_of_step


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[001-003,007,10-11]", ["node001", "node002", "node003", "node007", "node10", "node11"]),
        ("gpu-a[1-2],login.x,n[09-10]b", ["gpu-a1", "gpu-a2", "login.x", "n09b", "n10b"]),
        ("r[0-1]n[1,3]", ["r0n1", "r0n3", "r1n1", "r1n3"]),
        ("n[98-101]", ["n98", "n99", "n100", "n101"]),
    ],
)
def test_a_list_of_nodes(text: str, wanted: list[str]) -> None:
    assert expand(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "n[", "n]", "n[]", "n[3-1]", "n[1-", "n[a-b]", "n[1--2]", "n[1,,2]", "a,,b", ",a", "n[1-2", "n[[1-2]]", "$(x)", "a b",
        "n[0-99999999]", "n[0-9999]m[0-9999]", "a;b", "n[1-2]\n", "[1-2]@",
    ],
)  # fmt: skip
def test_what_is_no_list_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(SlurmError, match="SLURM_JOB_NODELIST"):
        expand(text)


def test_the_largest_list() -> None:
    assert len(expand(f"n[1-{MOST_NODES}]")) == MOST_NODES


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_NTASKS_PER_NODE": "1"}, 4),
        ({"SLURM_GPUS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "3"}, 3),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_NTASKS_PER_NODE": "2"}, 2),
    ],
)
def test_processes_of_a_node(env: dict[str, str], wanted: int | None) -> None:
    assert slots_by_node(env) == wanted


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4"}, "SLURM_NTASKS_PER_NODE=4, but a node has 8 GPUs"),
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "4"},
            "SLURM_GPUS_ON_NODE=8 contradicts SLURM_GPUS_PER_NODE=4",
        ),
        ({"SLURM_GPUS_PER_NODE": "a100:4,h100:2"}, "SLURM_GPUS_PER_NODE='a100:4,h100:2'"),
        ({"SLURM_NTASKS_PER_NODE": "many"}, "SLURM_NTASKS_PER_NODE='many'"),
    ],
)
def test_contradictions_name_both(env: dict[str, str], words: str) -> None:
    with pytest.raises(SlurmError) as caught:
        slots_by_node(env)
    assert words in str(caught.value)


def test_the_nodes_of_a_job_and_of_a_step() -> None:
    job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_NUM_NODES": "3"}
    step = {
        "SLURM_STEP_NODELIST": "n[2-3]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "1",
    }
    assert nodes({}) == ([], "SLURM_JOB_NODELIST")
    assert nodes(job) == (["n1", "n2", "n3"], "SLURM_JOB_NODELIST")
    assert nodes({**job, **step}) == (["n2", "n3"], "SLURM_STEP_NODELIST")
    assert task_of_step({**job, **step}, 2) == 1
    with pytest.raises(SlurmError, match="SLURM_JOB_NUM_NODES=3, but SLURM_JOB_NODELIST names 2"):
        nodes({**job, "SLURM_JOB_NODELIST": "n[1-2]"})
    with pytest.raises(SlurmError, match="SLURM_STEP_NUM_TASKS=16, .* with srun --ntasks-per-node=1"):
        task_of_step({**step, "SLURM_STEP_NUM_TASKS": "16"}, 2)
