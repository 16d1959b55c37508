"""A run's metrics in Weights & Biases, through the interface of clu's metric writers.

wandb is imported where a run asks for it.  What wandb itself reads from the environment is in force: without
a login, `WANDB_MODE=offline` keeps everything in the workdir, and `wandb sync` uploads it later.
"""

import html
import importlib.util
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from sol_jax.digests import cache_folder
from sol_jax.errors import UserError, reason
from sol_jax.files import as_os_errors, is_remote, write_whole

ID_FILE = "wandb-id"  # in the workdir: a run that resumes goes on in the same run there


def check_installed(project: str) -> None:
    """Raises `UserError` if metrics cannot go to a project, for its package is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.train.wandb is {project!r}, but the package wandb is not here: pip install wandb, or "
            "leave the field empty"
        )


class WandbWriter:
    """Has the methods of `clu.metric_writers.MetricWriter`, whose package needs TensorFlow to be imported.

    Args:
      workdir: of the run; wandb's own files go to a folder `wandb` in it, or, as wandb writes on this machine
        alone, in `~/.cache/sol_jax` if it is on an object store.
      project: of the runs to stand beside.
      config: dotted path -> value, to sort and filter runs by.

    Raises `UserError` if wandb cannot start.
    """

    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]):
        check_installed(project)
        import wandb

        self._wandb = wandb
        here = cache_folder() if is_remote(workdir) else workdir
        try:
            here.mkdir(parents=True, exist_ok=True)  # or wandb takes some other folder
            self._run = wandb.init(
                project=project, name=workdir.absolute().name, dir=str(here), id=_run_id(workdir),
                resume="allow", config=dict(config), settings=wandb.Settings(silent=True),
            )  # fmt: skip
        except Exception as fault:  # its own errors have no base in common with those of the network
            raise UserError(
                f"config.train.wandb: wandb cannot start a run ({reason(fault)}); log in with `wandb login`, "
                "or set WANDB_MODE=offline"
            ) from None

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._run.log({name: float(value) for name, value in scalars.items()}, step=int(step))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """As text: whatever is in it, it is shown and not run."""
        shown = {name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()}
        self._run.log(shown, step=int(step))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images [N, height, width, channels], of which wandb takes each by itself."""
        shown = {name: [self._wandb.Image(image) for image in stack] for name, stack in images.items()}
        self._run.log(shown, step=int(step))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        buckets = num_buckets or {}
        shown = {
            name: self._wandb.Histogram(array, num_bins=buckets.get(name, 30))
            for name, array in arrays.items()
        }
        self._run.log(shown, step=int(step))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._run.config.update(dict(hparams), allow_val_change=True)

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Any = None) -> None:
        """Of TensorBoard's plugins wandb knows nothing: left out."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Left out: a run here has none."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Left out: a run here has none."""

    def flush(self) -> None:
        """wandb writes by itself."""

    def close(self) -> None:
        self._run.finish()


def _run_id(workdir: pathlib.Path) -> str:
    """Made once, and then of the workdir, wherever that is moved."""
    file = workdir / ID_FILE
    try:
        with as_os_errors():
            if not file.exists():
                write_whole(file, uuid.uuid4().hex[:12] + "\n")
            return file.read_text().strip()
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {(error.strerror or str(error)).lower()}") from error
