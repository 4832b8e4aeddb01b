"""One output in two run folders: linked, so that it lies on disk once. Decides nothing about what is shared with whom.

Hard links: neither folder is the owner, and either may be deleted. Finished outputs are replaced, never written into.
"""

import os
import shutil
from pathlib import Path

from wsi_anomaly.storage.record import Recipe, current_record, read_record, writing


def share_output(stage: str, source: Path, target: Path) -> None:
    """Give the folder `target` what a stage left in the folder `source`, unless it has the same already.

    Where a disk knows no links, the files are copied.

    Raises:
        MissingOutputError: the stage has not run in `source`.
        LockedOutputError: another process is making the same output in `target`.
        OutputError: `target` cannot be written.
    """
    record = read_record(source, stage)
    recipe = Recipe(**record.recipe)
    if current_record(target, recipe):
        return
    with writing(target, recipe) as work:
        for name in record.outputs:
            if (source / name).is_dir():
                shutil.copytree(source / name, work.folder / name, copy_function=_link)
            else:
                _link(source / name, work.folder / name)
        work.facts.update(record.facts)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
