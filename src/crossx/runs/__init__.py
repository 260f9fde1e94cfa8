"""The run folder: its files, and writing them so that a kill cannot corrupt them. Imports no torch.

::

    RUN/
      config.yaml               every option of the run, as `crossx fit --config` reads it
      model.json                ModelSpec: how to rebuild the network and prepare its input
      model.safetensors         weights of the selected checkpoint
      run.json                  provenance: versions, git state, seed, dataset, how the checkpoint was selected
      metrics.csv metrics.json  training history
      checkpoints/best.ckpt     best on validation; last.ckpt, previous.ckpt: the newest two, for --resume
      checkpoints/SHA256SUMS    checksums of the three
      exclude.csv               the images that `--data.exclude` left out
      images.npy                fingerprints of the training images, which `crossx test` recognises
      neighbors.npz             features of the training images, for `crossx neighbors`
      test.json ...             written by `crossx test`
"""

from crossx.runs.environment import PACKAGES, environment
from crossx.runs.files import (
    atomic_path,
    check_files,
    check_output_file,
    check_writable,
    file_checksum,
    is_intact,
    is_utf8,
    parse_json,
    read_config,
    read_history,
    read_json,
    read_results,
    storage_error,
    user_path,
    write_json,
    write_text,
)
from crossx.runs.folder import (
    COMPLETE,
    EXPORT_SUFFIXES,
    EXPORTED,
    PREDICTS_ALONE,
    Run,
    RunFileError,
    find_run,
    free_folder,
    open_run,
    resume_command,
)
from crossx.runs.locks import is_lock, lock_holder, locked_folder, stop_holder
from crossx.runs.spec import SCHEMA, ModelSpec, PredictionSets, Preprocessing, Rejection

__all__ = [
    "COMPLETE",
    "EXPORTED",
    "EXPORT_SUFFIXES",
    "PACKAGES",
    "PREDICTS_ALONE",
    "SCHEMA",
    "ModelSpec",
    "PredictionSets",
    "Preprocessing",
    "Rejection",
    "Run",
    "RunFileError",
    "atomic_path",
    "check_files",
    "check_output_file",
    "check_writable",
    "environment",
    "file_checksum",
    "find_run",
    "free_folder",
    "is_intact",
    "is_lock",
    "is_utf8",
    "lock_holder",
    "locked_folder",
    "open_run",
    "parse_json",
    "read_config",
    "read_history",
    "read_json",
    "read_results",
    "resume_command",
    "stop_holder",
    "storage_error",
    "user_path",
    "write_json",
    "write_text",
]
