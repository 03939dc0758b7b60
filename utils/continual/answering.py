"""The model of a run as it answers for one of its tasks, when training is over.

PackNet and progressive columns give each task weights of its own: the bare model answers for the last task, or for
none. Which task a sample is of, the caller must know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from utils.continual.extension import make_extension
from utils.continual.learner import TaskAdapter
from utils.continual.method import all_as_of
from utils.continual.scenario import make_tasks
from utils.runtime.errors import ConfigError, RunError
from utils.training.resume import open_run
from utils.training.run import Run


@contextmanager
def answering(
    run: Run | str | Path, task: int | str, *, model: nn.Module | None = None, trust: bool = False
) -> Iterator[TaskAdapter]:
    """Let the model of a run answer for a task while the block runs, with the weights of the newest checkpoint.

    Args:
        run: The run, or its directory.
        task: Number from 0, or name.
        model: The model, where the run has no source of it; it gets the checkpoint's weights.
        trust: Run the model's code even if it touches what it should not.

    Yields:
        The model's adapter, whose ``logits`` are lowest where an output does not answer the task; in eval mode.

    Raises:
        RunError: The run did not learn task after task, or cannot be opened.
        ConfigError: It has no such task.
    """
    directory = run.directory if isinstance(run, Run) else Path(run)
    opened, state = open_run(directory, model=model, trust=trust)
    if "continual" not in state:
        raise RunError(
            f"The run in {directory} did not learn task after task.",
            "Expected a run with TrainingConfig.continual.",
            "Use its model as it is: utils.open_run(directory)[0].model.",
        )
    extension = make_extension(opened.config)
    extension.use_data(opened.data)
    extension.load_state_dict(state["continual"])
    tasks = make_tasks(opened.data, extension.settings, opened.config.seed)
    found = [one for one in tasks if task in (one.name, one.number)]
    if not found:
        raise ConfigError(
            f"The run in {directory} has no task {task!r}.",
            f"Expected a number from 0 to {len(tasks) - 1}, or one of {', '.join(repr(one.name) for one in tasks)}.",
        )
    learner = extension.make_learner(opened.adapter, opened.data, tasks)
    learner.task = tasks[-1]
    learner.masked.answers = learner.allowed(found[0].answers)
    opened.adapter.module.eval()
    with all_as_of(extension.methods, learner, found[0].number):
        yield learner.masked
