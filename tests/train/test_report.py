"""What a user sees of a run: lines, logs, trackers, the report; pages and masks by hand, the rest by real launches."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finebridge.finetune.cli import main as cli
from finebridge.train.arguments import parse
from finebridge.train.defaults import default_lines
from finebridge.train.progress import end_line, eval_line, step_line
from finebridge.train.record import MASK, RunRecord, changed_arguments, command_line, masked, read_record, span
from finebridge.train.report import ReportError, build, page, series_of
from rank_runner import RankRunner

Models = Callable[[str], Path]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (3 * 86400 + 4 * 3600, "3 d 4 h")],
)
def test_spans(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_lines() -> None:
    logs = {
        "loss": 1.23456, "grad_norm": 0.5, "learning_rate": 1e-4, "epoch": 0.5, "tokens_per_second": 12345.6,
        "trained_tokens_per_second": 234.5, "padding_share": 0.125, "memory_gib": 1.5,
    }  # fmt: skip
    line = "step 20/200  epoch 0.50  loss 1.2346  lr 0.0001  grad 0.5  12,346 tokens/s, 234 with loss, padding 12.5%"
    assert step_line(20, 200, logs, None) == f"{line}, 1.50 GiB"
    assert step_line(20, 200, {**logs, "mfu": 0.41}, 61) == f"{line}, MFU 41.0%, 1.50 GiB  1 min 1 s left"
    assert step_line(1, 2, {"loss": 1.0, "aux_loss": 0.01}, None) == "step 1/2  loss 1.0000  aux 0.0100"
    told = {
        "eval_loss": 2.0,
        "eval_accuracy": 0.5,
        "eval_tokens": 1234.0,
        "eval_runtime": 3.2,
        "eval_steps_per_second": 9.0,
    }
    assert eval_line(20, told) == "eval at step 20  loss 2.0000  accuracy 0.5000  tokens 1,234  took 3 s"
    assert end_line(5, {"train_runtime": 65.0, "train_loss": 1.0}) == "trained 5 steps in 1 min 5 s"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("hub_token", "abc", MASK),
        ("wandb-api-key", "abc", MASK),
        ("db_password", "abc", MASK),
        ("num_key_value_heads", "2", "2"),
        ("tokenizer_name_or_path", "folder", "folder"),
        ("map_keys", '{"prompt": "question"}', '{"prompt": "question"}'),
        ("accelerator_config", '{"api_key": "abc", "x": 1}', '{"api_key": "***", "x": 1}'),
        ("train_data_file", "https://me:secret@host/data.jsonl", "https://***@host/data.jsonl"),
        ("run_name", "hf_abcdefghijklmnop", MASK),
    ],
)
def test_secrets_are_masked(name: str, value: str, shown: str) -> None:
    assert masked(name, value) == shown


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--hub_token", "hf_verysecret", "--output_dir=a b", "--bf16", "--weight_decay", "-1e-5", "--push_key=abc"]
    told = "finebridge sft --hub_token '***' '--output_dir=a b' --bf16 --weight_decay -1e-5 '--push_key=***'"
    assert command_line(argv) == told
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_line(["--bf16"]) == "finebridge sft --nproc_per_node 4 --bf16"


def test_only_changed_arguments_are_listed(tmp_path: Path) -> None:
    words = [
        "--config_name",
        "qwen3",
        "--tokenizer_name_or_path",
        tmp_path,
        "--use_dummy_data",
        "--optim",
        "adamw_torch_fused",
    ]
    more = ["--learning_rate", "5e-5", "--max_steps", "7", "--hub_token", "abc", "--lora_rank", "64"]
    changed = changed_arguments(parse([str(word) for word in [*words, *more]]))
    assert changed == {
        "tokenizer_name_or_path": str(tmp_path), "config_name": "qwen3", "use_dummy_data": "True", "max_steps": "7",
        "hub_token": MASK,
    }  # fmt: skip


class Links(HTMLParser):
    """Tags, and every address that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]


def test_a_page_escapes_and_loads_nothing(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    launch = {"command": bad, "outcome": bad, "arguments": {bad: bad}, "tools": {}, "seconds": 5.0,
              "data": {bad: {"files": [bad], "rejects": {bad: 1}}}}  # fmt: skip
    html = page(tmp_path / "<b>", {"global_step": 3, "max_steps": 4}, [launch], {"loss": [(1, 2.0), (2, 3.0)]}, b"png")
    seen = Links()
    seen.feed(html)
    assert "script" not in seen.tags
    assert html.count("&lt;script&gt;") == 8
    assert seen.loaded == ["data:image/png;base64,cG5n"]
    assert "3.0000 at step 2; best 2.0000 at step 1" in html
    assert "3 of 4" in html


def test_series_leave_out_what_is_no_number() -> None:
    history = [
        {"step": 1, "loss": 1.0, "epoch": 0.1}, {"step": 2, "loss": float("nan"), "note": "x"},
        {"step": 2, "train_runtime": 1.0, "tokens_per_second": 5.0},
    ]  # fmt: skip
    assert series_of(history) == {"loss": [(1, 1.0)]}


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match="neither"):
        build(tmp_path)
    assert cli(["report", str(tmp_path)]) == 2
    assert "neither trainer_state.json nor run.json there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_newest_state_counts(tmp_path: Path) -> None:
    """A killed run has no state of its own but that of its checkpoints; a damaged one is passed over."""
    for step, text in ((2, '{"log_history": [], "global_step": 2, "max_steps": 9}'), (4, "{")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert [path.name for path in build(tmp_path)] == ["report.html"]
    html = (tmp_path / "report.html").read_text()
    assert "2 of 9" in html
    assert html.count("not whole") == 2
    assert not list(tmp_path.glob(".*"))


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 5, "logging_steps": 2,
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, "prepared_data_dir": data.parent / "prepared",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def logged(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def test_a_run_tells_what_it_does(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    """One rank: lines, logs, TensorBoard, report; then resumed, which adds a launch, and reported anew."""
    more = {
        "eval_data_file": train_file,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "peak_tflops": 1,
    }
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, **more)
    done = ranks.run([*argv, "--hub_token", "verysecret"], tmp_path / "log").check()
    lines = [line.split("  ")[0] for line in done.text.splitlines()]
    steps = [line for line in lines if line.startswith(("step ", "eval at "))]
    assert steps == ["step 2/5", "step 4/5", "eval at step 4", "step 5/5", "eval at step 5"]
    assert "{'" not in done.text
    defaults = done.text[done.text.index("defaults, as not given:") : done.text.index("step 2/5")]
    assert "--optim adamw_torch_fused" in defaults
    assert "float32 weights" in defaults
    assert "--learning_rate" not in defaults

    losses = [entry for entry in logged(tmp_path) if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 5]
    for entry in losses:
        assert 0 < entry["trained_tokens_per_second"] < entry["tokens_per_second"]
        assert 0 < entry["padding_share"] < 0.5
        assert 0 < entry["mfu"] < 1
        assert entry["memory_gib"] > 0
    end = logged(tmp_path)[-1]
    assert end["tokens_per_second"] > 0
    events = list((tmp_path / "runs").rglob("events.out.tfevents.*"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(events[0].parent)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/tokens_per_second", "train/mfu", "eval/loss"} <= set(scalars)

    html = (tmp_path / "report.html").read_text()
    assert "verysecret" not in html + (tmp_path / "run.json").read_text()
    assert "finished" in html
    assert "checkpoint-5" in html
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    told = read_record(tmp_path)[-1]
    assert told["data"]["training"]["rows"] == told["data"]["training"]["used"] == 24

    ranks.run(
        [*argv, "--max_steps", 6, "--resume_from_checkpoint", "--allow_drift", "max_steps"], tmp_path / "log2"
    ).check()
    assert [launch["outcome"] for launch in read_record(tmp_path)] == ["finished", "finished"]
    (tmp_path / "trainer_state.json").unlink()
    (tmp_path / "report.html").unlink()
    assert cli(["report", str(tmp_path)]) == 0
    assert "6 of 6" in (tmp_path / "report.html").read_text()


@pytest.mark.distributed
def test_the_logged_rate_is_that_of_the_step_under_deepspeed_too(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    """2 ranks with ZeRO-2 log what the plain run logs: DeepSpeed moves the schedule on before the Trainer asks."""
    more = {"logging_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "report_to": "none"}
    base = models("hunyuan_v1_dense")
    ranks.run(flags(base, train_file, tmp_path / "plain", **more), tmp_path / "log").check()
    argv = flags(base, train_file, tmp_path / "zero", **more, deepspeed="ds_zero2_no_offload")
    argv += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
    ranks.run(argv, tmp_path / "log2", ranks=2).check()
    plain, zero = ([e for e in logged(tmp_path / name) if "loss" in e] for name in ("plain", "zero"))
    rates = [entry["learning_rate"] for entry in plain]
    assert rates[:3] == [0.0, 0.0005, 0.001]
    assert [entry["learning_rate"] for entry in zero] == pytest.approx(rates)
    assert not (tmp_path / "plain" / "runs").exists()
    assert read_record(tmp_path / "zero")[0]["ranks"] == 2
    flos = [logged(tmp_path / name)[-1]["total_flos"] for name in ("plain", "zero")]
    assert flos[0] == pytest.approx(flos[1])  # the same samples ask for the same work, however they are dealt


@pytest.mark.distributed
def test_a_diverged_run_has_its_report(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    more = {"learning_rate": 1e30, "logging_steps": 1, "max_grad_norm": 0}
    (tmp_path / "loss.png").mkdir()  # no picture can be written: that is told, and the page stands
    done = ranks.run(flags(models("hunyuan_v1_dense"), train_file, tmp_path, **more), tmp_path / "log", ranks=2)
    assert done.codes == [1, 1]
    assert "warning: no report was written: IsADirectoryError" in done.text
    assert read_record(tmp_path)[0]["outcome"].startswith("DivergedError: step ")
    assert "DivergedError: step " in (tmp_path / "report.html").read_text()


def test_defaults_that_were_given_are_not_told(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from torch import nn

    words = (
        f"--config_name qwen3 --tokenizer_name_or_path {tmp_path} --use_dummy_data --no_packing --max_steps 3 --bf16"
    )
    model: Any = nn.Linear(2, 2)
    model.config = SimpleNamespace(_attn_implementation="sdpa")
    text = "\n".join(default_lines(parse(words.split()), model))
    assert "--packing" not in text
    assert "--num_train_epochs" not in text
    assert "weights" not in text
    assert "sdpa attention" in text
    assert "--save_steps 500" in text


def test_a_fresh_run_forgets_earlier_launches(tmp_path: Path) -> None:
    args = parse(f"--config_name qwen3 --tokenizer_name_or_path {tmp_path} --use_dummy_data".split())
    for resumed, number in ((False, 1), (True, 2), (False, 1)):
        record = RunRecord(tmp_path, resumed=resumed)
        record.open([], args, {"ranks": 1})
        assert len(read_record(tmp_path)) == number
        assert "without a word" in read_record(tmp_path)[-1]["outcome"]
        record.close("finished")
    assert read_record(tmp_path)[0]["seconds"] >= 0


def test_a_stopped_run_has_its_report(models: Models, train_file: Path, tmp_path: Path) -> None:
    """SIGTERM in mid-run, as schedulers send it."""
    words = [str(word) for word in flags(models("hunyuan_v1_dense"), train_file, tmp_path, max_steps=100000)]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "finebridge.train.sft", *words], stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while "step 4/" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
    assert "report: " in log.read_text()
    assert read_record(tmp_path)[0]["outcome"].startswith("StoppedError: stopped by SIGTERM at step")
    assert "of 100,000" in (tmp_path / "report.html").read_text()
